// What a model has beside itself: LoRAs to mix in, those that were sent here too, and ControlNets that follow a picture.

import { Refusal, ask, upload } from "./api.js";
import { $, h } from "./dom.js";
import { Slot } from "./slot.js";
import { trouble } from "./words.js";

const sent = new Map(); // ids of LoRAs → what their files were called
let loras = [];
let controls = [];
let takes = false; // whether LoRAs can be sent for the model
let tell = () => {};

function weight(name, most) {
  const label = `Weight of ${name}`;
  return h("input", { type: "number", class: "weight", min: "0", max: String(most), step: "0.05", value: "1", "aria-label": label });
}

/** What people call a LoRA: its name, or that of the file that was sent. */
export const called = (name) => sent.get(name) ?? name;

function mixed(name) {
  const box = h("input", { type: "checkbox" });
  const amount = weight(called(name), 2);
  return { name, box, amount, row: h("div", { class: "adapter" }, h("label", { class: "check" }, box, h("span", {}, called(name))), amount) };
}

/** One that was sent, where it can be chosen. */
function add(name) {
  const each = mixed(name);
  loras.push(each);
  $("loras").querySelector(".stack").append(each.row);
  return each;
}

/** Offer what a model has. */
export function offer(model, changed) {
  tell = changed;
  takes = model.lora_bytes > 0;
  loras = [...model.loras, ...(takes ? sent.keys() : [])].map(mixed);
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
  for (const [id, found, more] of [["loras", loras, takes], ["controls", controls, false]]) {
    $(id).hidden = !found.length && !more;
    $(id).querySelector(".stack").replaceChildren(...found.map((each) => each.row));
  }
  $("send-lora").hidden = !takes;
}

/** Let people send a LoRA of their own. */
export function prepare() {
  const [button, input, said] = [$("send-lora"), $("lora-file"), $("lora-said")];
  button.addEventListener("click", () => input.click());
  input.addEventListener("change", async () => {
    const file = input.files[0];
    if (!file) return;
    said.className = "slot-busy";
    said.textContent = `Sending ${file.name} …`;
    try {
      const { id } = await upload(file);
      sent.set(id, file.name.replace(/\.safetensors$/i, ""));
      if (takes) add(id).box.checked = true; // another model may have been chosen meanwhile
      said.className = said.textContent = "";
      tell();
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      said.className = "trouble-line";
      said.textContent = trouble(error).text;
    }
    input.value = "";
  });
}

/** The fields of a request that they are. */
export function read() {
  const asked = {};
  const chosen = loras.filter((each) => each.box.checked);
  const shown = controls.filter((each) => each.slot.full);
  if (chosen.length) asked.loras = chosen.map(({ name, amount }) => ({ name, weight: Number(amount.value) }));
  if (shown.length) {
    asked.controls = shown.map(({ name, slot, amount }) => ({ name, image: slot.id, weight: Number(amount.value) }));
    asked.fit = "cover";
  }
  return asked;
}

/** Whether the server has a file still. */
async function there(id) {
  try {
    await ask(`v1/files/${id}`, { headers: { range: "bytes=0-0" } });
    return true;
  } catch (error) {
    if (error.status !== 404 && error.status !== 400) throw error;
    return false;
  }
}

/** Show those of a request; one that was sent and is not there any more is told. */
export async function write(request) {
  const uses = (request.loras ?? []).map((use) => (typeof use === "string" ? { name: use } : use));
  $("lora-said").className = $("lora-said").textContent = "";
  for (const { name } of takes ? uses : []) {
    if (!/^file_/.test(name)) continue;
    const found = loras.find((each) => each.name === name);
    if (await there(name)) {
      if (!found) add(name);
      continue;
    }
    $("lora-said").className = "trouble-line";
    $("lora-said").textContent = "A LoRA of that picture is not there any more; upload it again to draw with it.";
    sent.delete(name);
    found?.row.remove();
    loras = loras.filter((each) => each !== found);
  }
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
