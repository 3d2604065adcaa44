// Painting a mask over a picture: what is painted is drawn anew.
//
// Strokes are kept as strokes and drawn again for undo, so that a large picture needs no copies of itself.

import { blobOf, upload } from "./api.js";
import { $, drawIcons, h } from "./dom.js";

const INK = "#e4572e";

/** Have a mask painted for a slot's picture. Returns {id, url} of the mask, or null if nothing is painted. */
export function paint(slot) {
  const dialog = $("mask-dialog");
  const easel = new Easel(slot);
  dialog.showModal();
  easel.canvas.focus();
  return new Promise((resolve) => {
    const close = async (done) => {
      const mask = done && easel.strokes.length ? await easel.mask() : null;
      easel.away();
      dialog.close();
      resolve(mask);
    };
    $("mask-done").onclick = () => close(true);
    $("mask-cancel").onclick = () => close(false);
    dialog.oncancel = (event) => {
      event.preventDefault();
      close(false);
    };
  });
}

/** A mask that the server has, as a slot shows it. */
export async function fetched(id) {
  const bitmap = await createImageBitmap(await blobOf(`v1/files/${id}`));
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const data = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < data.data.length; at += 4) {
    data.data[at + 3] = data.data[at];
    data.data.set([228, 87, 46], at);
  }
  context.putImageData(data, 0, 0);
  return { id, url: URL.createObjectURL(await canvas.convertToBlob()) };
}

class Easel {
  constructor(slot) {
    this.strokes = [];
    this.stroke = null;
    this.tool = "paint";
    this.at = [slot.width / 2, slot.height / 2];
    this.canvas = h("canvas", {
      width: slot.width, height: slot.height, tabindex: "0", role: "application",
      "aria-label": "The picture to paint on", "aria-describedby": "mask-help",
    });
    this.ring = h("span", { class: "ring", hidden: true });
    this.context = this.canvas.getContext("2d");
    const sheet = $("sheet");
    sheet.replaceChildren(h("img", { src: slot.url, alt: "" }), this.canvas, this.ring);
    sheet.style.aspectRatio = `${slot.width} / ${slot.height}`;
    sheet.style.setProperty("--shape", slot.width / slot.height);
    this.listen();
    drawIcons($("mask-dialog"));
  }

  /** Brush size in pixels of the picture. */
  get size() {
    return Math.max(1, (Number($("brush").value) / 100) * Math.max(this.canvas.width, this.canvas.height));
  }

  listen() {
    this.ending = new AbortController();
    const on = (node, name, work) => node.addEventListener(name, work, { signal: this.ending.signal });
    on(this.canvas, "pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.begin(this.place(event));
    });
    on(this.canvas, "pointermove", (event) => {
      for (const each of event.getCoalescedEvents?.() ?? [event]) if (this.stroke) this.go(this.place(each));
      this.at = this.place(event);
      this.show();
    });
    for (const name of ["pointerup", "pointercancel"]) on(this.canvas, name, () => this.end());
    on(this.canvas, "pointerleave", () => (this.ring.hidden = true));
    on(this.canvas, "keydown", (event) => this.press(event));
    on(this.canvas, "keyup", (event) => event.key === " " && this.end());
    on(this.canvas, "blur", () => this.end());
    for (const each of document.getElementsByName("tool")) {
      on(each, "change", () => (this.tool = each.value));
      each.checked = each.value === "paint";
    }
    on($("mask-undo"), "click", () => this.redraw(this.strokes.slice(0, -1)));
    on($("mask-clear"), "click", () => this.redraw([]));
    on($("mask-invert"), "click", () => this.redraw([...this.strokes, { tool: "invert" }]));
  }

  away() {
    this.ending.abort();
    $("sheet").replaceChildren();
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  press(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      const far = this.size / 2;
      const to = [this.at[0] + step[0] * far, this.at[1] + step[1] * far];
      this.at = [Math.min(this.canvas.width, Math.max(0, to[0])), Math.min(this.canvas.height, Math.max(0, to[1]))];
      if (this.stroke) this.go(this.at);
    } else if (event.key === " ") {
      if (!event.repeat) this.begin(this.at);
    } else if (event.key === "e") {
      const other = this.tool === "paint" ? "erase" : "paint";
      document.querySelector(`[name=tool][value=${other}]`).click();
      this.canvas.focus();
    } else if (event.key === "[" || event.key === "]") {
      $("brush").value = Number($("brush").value) + (event.key === "]" ? 2 : -2);
    } else return;
    event.preventDefault();
    this.show();
  }

  begin(at) {
    this.stroke = { tool: this.tool, size: this.size, points: [at] };
    this.strokes.push(this.stroke);
    this.line(this.stroke, at, at);
  }

  go(to) {
    this.line(this.stroke, this.stroke.points.at(-1), to);
    this.stroke.points.push(to);
  }

  end() {
    this.stroke = null;
  }

  line({ tool, size }, from, to) {
    const { context } = this;
    context.globalCompositeOperation = tool === "erase" ? "destination-out" : "source-over";
    Object.assign(context, { strokeStyle: INK, lineWidth: size, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
  }

  redraw(strokes) {
    const { context, canvas } = this;
    this.strokes = strokes;
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (const stroke of strokes) {
      if (stroke.tool === "invert") {
        context.globalCompositeOperation = "xor";
        context.fillStyle = INK;
        context.fillRect(0, 0, canvas.width, canvas.height);
      } else stroke.points.forEach((point, k) => this.line(stroke, stroke.points[Math.max(0, k - 1)], point));
    }
  }

  /** Show where the brush is. */
  show() {
    const box = this.canvas.getBoundingClientRect();
    const scale = box.width / this.canvas.width;
    this.ring.hidden = false;
    Object.assign(this.ring.style, {
      width: `${this.size * scale}px`, height: `${this.size * scale}px`,
      left: `${this.at[0] * scale}px`, top: `${this.at[1] * scale}px`,
    });
  }

  /** Send it: white where painted, black elsewhere, nothing between. Null if nothing is painted. */
  async mask() {
    const { width, height } = this.canvas;
    const data = this.context.getImageData(0, 0, width, height);
    let painted = 0;
    for (let at = 0; at < data.data.length; at += 4) {
      const value = data.data[at + 3] > 127 ? 255 : 0;
      data.data.set([value, value, value, 255], at);
      painted += value > 0;
    }
    if (!painted) return null;
    const url = URL.createObjectURL(await blobOfCanvas(this.canvas));
    const plain = h("canvas", { width, height });
    plain.getContext("2d").putImageData(data, 0, 0);
    return { id: (await upload(await blobOfCanvas(plain))).id, url };
  }
}

const blobOfCanvas = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
