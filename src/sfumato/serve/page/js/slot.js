// A place for a picture that a request begins with or follows: chosen, dropped, pasted, or taken from the gallery.

import { Refusal, blobOf, upload } from "./api.js";
import { h } from "./dom.js";
import { trouble } from "./words.js";

const KINDS = "image/png,image/jpeg,image/webp";

/** host: the element to live in. words: what it says while it is empty. changed: called when its picture changes. */
export class Slot {
  constructor(host, words, changed) {
    Object.assign(this, { host, words, changed });
    this.input = h("input", { type: "file", accept: KINDS, class: "hidden", tabindex: "-1", "aria-label": words });
    this.input.addEventListener("change", () => this.choose(this.input.files[0]));
    host.addEventListener("dragover", (event) => event.preventDefault());
    host.addEventListener("dragenter", () => host.classList.add("over"));
    host.addEventListener("dragleave", (event) => host.contains(event.relatedTarget) || host.classList.remove("over"));
    host.addEventListener("drop", (event) => {
      event.preventDefault();
      host.classList.remove("over");
      this.choose(event.dataTransfer.files[0]);
    });
    this.clear();
  }

  get full() {
    return this.id !== null;
  }

  clear() {
    if (this.url) URL.revokeObjectURL(this.url);
    Object.assign(this, { id: null, url: null, width: 0, height: 0, mask: null });
    this.input.value = "";
    const button = h("button", { type: "button", class: "empty-slot", icon: "picture" }, this.words);
    button.addEventListener("click", () => this.input.click());
    this.host.replaceChildren(this.input, button);
    this.changed?.(this);
  }

  /** Take a file: the server must know it before it counts. id: if the server has it already. */
  async choose(blob, id = null) {
    if (!blob) return false;
    this.clear();
    this.say("Sending the picture …", true);
    try {
      const bitmap = await decoded(blob);
      const found = id ?? (await upload(blob)).id;
      Object.assign(this, { id: found, url: URL.createObjectURL(blob), width: bitmap.width, height: bitmap.height });
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      this.clear();
      this.host.append(h("p", { class: "trouble-line", role: "alert" }, trouble(error).text));
      return false;
    }
    this.draw();
    this.changed?.(this);
    return true;
  }

  /** Take a picture that the server has, by its id. */
  async fetch(id) {
    return this.choose(await blobOf(`v1/files/${id}`), id);
  }

  /** mask: {id, url}, or null. */
  setMask(mask) {
    this.mask = mask;
    this.draw();
    this.changed?.(this);
  }

  say(text, busy = false) {
    this.host.replaceChildren(this.input, h("p", { class: busy ? "slot-busy" : "muted" }, text));
  }

  draw() {
    const words = `${this.width} × ${this.height}${this.mask ? ", with a mask" : ""}`;
    this.frame = h("div", { class: "slot-frame" }, h("img", { src: this.url, alt: "The picture to begin with" }));
    if (this.mask) this.frame.append(h("img", { class: "slot-mask", src: this.mask.url, alt: "" }));
    const away = h("button", { type: "button", class: "icon-button", icon: "close", "aria-label": "Remove the picture" });
    away.addEventListener("click", () => {
      this.clear();
      this.host.querySelector("button").focus();
    });
    this.host.replaceChildren(this.input, h("div", { class: "slot-full" }, this.frame, h("span", { class: "muted" }, words), away));
  }

  /** Show where a preflight found what will be lost. */
  mark(regions) {
    this.frame?.querySelectorAll(".region").forEach((node) => node.remove());
    for (const { box, verdict, name, reason } of regions) {
      const node = h("span", { class: `region ${verdict}`, title: `${name}: ${reason}` });
      Object.assign(node.style, {
        left: `${(100 * box.left) / this.width}%`,
        top: `${(100 * box.top) / this.height}%`,
        width: `${(100 * (box.right - box.left)) / this.width}%`,
        height: `${(100 * (box.bottom - box.top)) / this.height}%`,
      });
      this.frame?.append(node);
    }
  }
}

async function decoded(blob) {
  try {
    return await createImageBitmap(blob);
  } catch {
    const message = "This is no picture that a browser can read; PNG, JPEG and WebP are taken.";
    throw new Refusal(0, { code: "bad_input", message });
  }
}
