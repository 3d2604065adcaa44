// What a model has beside itself: LoRAs to mix in, and ControlNets that follow a picture.

import { $, h } from "./dom.js";
import { Slot } from "./slot.js";

let loras = [];
let controls = [];

function weight(name, most) {
  const label = `Weight of ${name}`;
  return h("input", { type: "number", class: "weight", min: "0", max: String(most), step: "0.05", value: "1", "aria-label": label });
}

/** Offer what a model has. */
export function offer(model, changed) {
  loras = model.loras.map((name) => {
    const box = h("input", { type: "checkbox" });
    const amount = weight(name, 2);
    return { name, box, amount, row: h("div", { class: "adapter" }, h("label", { class: "check" }, box, h("span", {}, name)), amount) };
  });
  controls = model.controls.map((name) => {
    const host = h("div", { class: "slot compact", role: "group", "aria-label": `A picture of kind ${name}` });
    const amount = weight(name, 2);
    const slot = new Slot(host, `Choose a picture of kind “${name}”`, null);
    const row = h("div", { class: "adapter" }, host, amount);
    amount.hidden = true;
    slot.changed = () => {
      amount.hidden = !slot.full;
      changed();
    };
    return { name, slot, amount, row };
  });
  for (const [id, found] of [["loras", loras], ["controls", controls]]) {
    $(id).hidden = !found.length;
    $(id).querySelector(".stack").replaceChildren(...found.map((each) => each.row));
  }
}

/** The fields of a request that they are. */
export function read() {
  const asked = {};
  const mixed = loras.filter((each) => each.box.checked);
  const shown = controls.filter((each) => each.slot.full);
  if (mixed.length) asked.loras = mixed.map(({ name, amount }) => ({ name, weight: Number(amount.value) }));
  if (shown.length) {
    asked.controls = shown.map(({ name, slot, amount }) => ({ name, image: slot.id, weight: Number(amount.value) }));
    asked.fit = "cover";
  }
  return asked;
}

/** Show those of a request. */
export async function write(request) {
  const uses = (request.loras ?? []).map((use) => (typeof use === "string" ? { name: use } : use));
  for (const each of loras) {
    const use = uses.find(({ name }) => name === each.name);
    each.box.checked = Boolean(use);
    each.amount.value = use?.weight ?? 1;
  }
  for (const each of controls) {
    const use = (request.controls ?? []).find(({ name }) => name === each.name);
    if (use) await each.slot.fetch(use.image);
    else if (each.slot.full) each.slot.clear();
    each.amount.value = use?.weight ?? 1;
  }
}

/** How many are in use. */
export const used = () => loras.filter((each) => each.box.checked).length + controls.filter((each) => each.slot.full).length;
