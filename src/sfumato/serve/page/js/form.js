// The form: what it says as a request, and a request as what it says.

import * as adapters from "./adapters.js";
import { $, drawIcons, h, toast } from "./dom.js";
import { paint } from "./mask.js";
import { Slot } from "./slot.js";
import { times } from "./words.js";

const FIELDS = ["steps", "guidance", "sampler", "schedule"];
const SHAPES = [["Square", 1, 1], ["Landscape", 4, 3], ["Wide", 16, 9], ["Portrait", 3, 4], ["Tall", 9, 16]];
const HERE = new Set([
  "prompt", "negative", "count", "seed", ...FIELDS, "size", "image", "mask", "strength", "fit", "loras", "controls",
  "frames", "fps",
]);
const CHANCE = 2 ** 32;
const MOST_SEED = 2n ** 64n - 1n;

let models = [];
let model = null;
let carried = {}; // fields of a request that the form has no place for
let lastSeed = null;
let start = null;

export const current = () => model;
/** Whether the model reads a prompt; those that only set a picture in motion do not. */
const reads = () => !model.needs_image;
export const moves = () => form().elements.kind.value === "clip";
export const startSlot = () => start;
/** The first model that makes clips, the chosen one before others. */
export const animator = () => [model, ...models].find((each) => each?.clips) ?? null;

const form = () => $("form");
const changed = () => form().dispatchEvent(new Event("input"));

export function build(found) {
  models = found;
  start = new Slot($("start-slot"), "Choose, drop or paste a picture", started);
  $("model").replaceChildren(...models.map(({ name }) => h("option", { value: name }, name)));
  $("model-field").hidden = models.length < 2;
  $("model").addEventListener("change", () => choose($("model").value));
  $("shape").addEventListener("change", reshape);
  for (const id of ["width", "height"]) $(id).addEventListener("input", nameShape);
  for (const id of ["width", "height"]) $(id).addEventListener("input", fitting);
  for (const each of form().querySelectorAll("[name=kind]")) each.addEventListener("change", showKind);
  for (const range of form().querySelectorAll("input[type=range]")) pair(range, $(range.id.replace("-range", "")));
  $("paint").addEventListener("click", painted);
  $("unmask").addEventListener("click", () => start.setMask(null));
  $("last-seed").addEventListener("click", () => {
    $("seed").value = lastSeed ?? "";
    changed();
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (file && !document.querySelector("dialog[open]")) start.choose(file);
  });
  adapters.prepare();
  drawIcons(form());
  if (matchMedia("(max-width: 760px)").matches) $("settings").open = false;
  form().addEventListener("input", aside);
  choose(models[0].name);
}

function pair(range, number) {
  range.addEventListener("input", () => {
    number.value = range.value;
  });
  number.addEventListener("input", () => {
    range.value = number.value;
  });
}

function put(id, value) {
  $(id).value = value;
  const range = $(`${id}-range`);
  if (range) range.value = value;
}

/** Take a model with its own settings. */
export function choose(name) {
  model = models.find((each) => each.name === name) ?? models[0];
  const { preset } = model;
  $("model").value = model.name;
  for (const [id, names] of [["sampler", model.samplers], ["schedule", model.schedules]]) {
    $(id).replaceChildren(...names.map((each) => h("option", { value: each }, each)));
  }
  for (const field of FIELDS) if (preset[field] !== undefined) put(field, preset[field]);
  const { frames, fps } = { ...model.clip_preset, ...preset };
  $("frames").value = frames ?? "";
  $("fps").value = fps ?? "";
  $("width").step = $("height").step = model.multiple;
  adapters.offer(model, changed);
  $("kinds").hidden = !model.clips;
  setKind(model.clips && (preset.frames ?? 1) > 1 ? "clip" : "picture");
  $("start-aside").textContent = model.needs_image ? "this model needs one" : "optional";
  for (const id of ["prompt-field", "negative-field"]) $(id).hidden = !reads();
  if (start?.full) sizeOfStart();
  else setSize(preset.size);
  changed();
}

export function setKind(kind) {
  form().elements.kind.value = kind;
  showKind();
}

function showKind() {
  $("clip-fields").hidden = !moves();
  $("paint").hidden = $("strength-field").hidden = moves();
  $("draw").textContent = moves() ? "Animate" : "Draw";
  changed();
}

// --- size ------------------------------------------------------------------------------------------------------------

const whole = (value) => Math.max(model.multiple, Math.round(value / model.multiple) * model.multiple);

function shapes() {
  const [width, height] = model.preset.size;
  const named = SHAPES.map(([name, across, down]) => {
    const side = Math.sqrt((width * height) / (across * down));
    return [name, whole(side * across), whole(side * down)];
  });
  return [...named, ["Larger", whole(width * 1.5), whole(height * 1.5)]];
}

function setSize([width, height]) {
  $("width").value = width;
  $("height").value = height;
  nameShape();
  fitting();
}

function nameShape() {
  const [width, height] = [Number($("width").value), Number($("height").value)];
  const found = shapes();
  const mine = found.findIndex(([, w, h_]) => w === width && h_ === height);
  const options = found.map(([name, w, h_], at) => h("option", { value: at, selected: at === mine }, `${name} ${w} × ${h_}`));
  if (mine < 0) options.unshift(h("option", { value: "", selected: true }, "Of its own"));
  $("shape").replaceChildren(...options);
}

function reshape() {
  const found = shapes()[Number($("shape").value)];
  if ($("shape").value !== "") setSize(found.slice(1));
  changed();
}

// --- the picture to begin with ---------------------------------------------------------------------------------------

function started(slot) {
  $("start-more").hidden = !slot.full;
  $("unmask").hidden = !slot.mask;
  if (!slot.full) {
    delete slot.known;
  } else if (slot.known !== slot.id) {
    slot.known = slot.id;
    sizeOfStart();
    put("strength", 0.75);
  }
  if (Boolean(slot.mask) !== Boolean(slot.masked)) put("strength", slot.mask ? 1 : 0.75);
  slot.masked = slot.mask;
  fitting();
  changed();
}

/** The size of the picture, if a model would draw it; else of its shape, of the model's own area. */
function sizeOfStart() {
  const [width, height] = model.preset.size;
  const area = start.width * start.height;
  const scale = area > 4 * width * height || area < (width * height) / 4 ? Math.sqrt((width * height) / area) : 1;
  setSize([whole(start.width * scale), whole(start.height * scale)]);
}

function fitting() {
  const [width, height] = [Number($("width").value), Number($("height").value)];
  $("fit-field").hidden = !start?.full || (start.width === width && start.height === height);
}

async function painted() {
  const mask = await paint(start);
  if (mask) start.setMask(mask);
}

/** Begin with a picture of the gallery. mask: whether to paint on it at once. */
export async function beginWith(blob, { mask = false } = {}) {
  if (!(await start.choose(blob))) return;
  $("start").scrollIntoView({ block: "nearest" });
  if (mask) await painted();
  else toast("The picture is where the next one begins.");
}

// --- requests --------------------------------------------------------------------------------------------------------

const number = (id) => ($(id).value.trim() === "" ? null : Number($(id).value));

/** What is to be drawn, {model, request}. seeded: with a seed by chance where none is given. */
export function read({ seeded = false } = {}) {
  const request = { ...carried };
  if (reads()) request.prompt = $("prompt").value.trim();
  if (reads() && $("negative").value.trim()) request.negative = $("negative").value.trim();
  for (const id of ["steps", "guidance", ...(moves() ? ["frames", "fps"] : [])]) {
    if (number(id) !== null) request[id] = number(id);
  }
  Object.assign(request, { sampler: $("sampler").value, schedule: $("schedule").value });
  if (number("width") !== null && number("height") !== null) request.size = [number("width"), number("height")];
  if ((number("count") ?? 1) !== 1) request.count = number("count");
  const seed = $("seed").value.trim();
  if (seed) request.seed = /^\d{1,20}$/.test(seed) && BigInt(seed) <= MOST_SEED ? BigInt(seed) : seed;
  else if (seeded) request.seed = Math.floor(Math.random() * CHANCE);
  if (seeded && request.seed !== undefined) lastSeed = String(request.seed);
  Object.assign(request, adapters.read());
  if (start.full) {
    request.image = start.id;
    if (!moves()) request.strength = number("strength") ?? 0.75;
    if (!moves() && start.mask) request.mask = start.mask.id;
    if (!$("fit-field").hidden) request.fit = $("fit").value;
  }
  return { model: model.name, request };
}

/** Show a job's request in the form. seed: of the picture that is meant. */
export async function write(job, seed) {
  choose(job.model);
  const { request } = job;
  setKind(job.object === "video" ? "clip" : "picture");
  $("prompt").value = request.prompt ?? "";
  $("negative").value = request.negative ?? "";
  $("seed").value = seed ?? request.seed ?? 0;
  $("count").value = 1;
  for (const field of [...FIELDS, "frames", "fps"]) if (request[field] != null) put(field, request[field]);
  if (request.image) {
    if (!(await start.fetch(request.image))) return;
    if (request.mask) {
      const mask = await (await import("./mask.js")).fetched(request.mask);
      start.setMask(mask);
    }
    if (request.strength != null) put("strength", request.strength);
    if (request.fit) $("fit").value = request.fit;
  } else if (start.full) start.clear();
  await adapters.write(request);
  setSize(request.size ?? job.expected.size);
  carried = Object.fromEntries(Object.entries(request).filter(([name, value]) => !HERE.has(name) && value != null));
  showCarried();
  changed();
}

function showCarried() {
  const names = Object.keys(carried);
  $("carried").hidden = !names.length;
  const away = h("button", { type: "button", class: "small" }, "Leave out");
  away.addEventListener("click", () => {
    carried = {};
    showCarried();
    changed();
  });
  $("carried").replaceChildren(h("span", {}, `With ${names.join(", ")} of that picture`), away);
}

/** What the closed settings say of themselves. */
function aside() {
  const parts = [`${$("width").value} × ${$("height").value}`, times(Number($("steps").value), "step"), $("sampler").value];
  if (adapters.used()) parts.push(times(adapters.used(), "adapter"));
  $("settings-aside").textContent = parts.join(" · ");
}
