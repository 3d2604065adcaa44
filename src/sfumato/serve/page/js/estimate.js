// Beside the button, before anything is paid: what it will cost and take, and what of it will not survive.

import { Refusal, UNREACHABLE, post } from "./api.js";
import { $, h, later } from "./dom.js";
import * as form from "./form.js";
import { icon } from "./icons.js";
import { money, seconds, sentence, times } from "./words.js";

const PAUSE = 350; // milliseconds after the last change
let asking = null;
let again; // a timer, while the server is too busy to say

export function begin() {
  const ask = later(PAUSE, look);
  $("form").addEventListener("input", ask);
  $("form").addEventListener("change", ask);
}

/** Ask the server again. */
export async function look() {
  if (!form.current()) return;
  asking?.abort();
  clearTimeout(again);
  asking = new AbortController();
  const { signal } = asking;
  const order = form.read();
  $("price").classList.add("waiting");
  try {
    // one after the other: a request that cannot be drawn has no preflight
    const found = await post(form.moves() ? "v1/videos/estimate" : "v1/estimate", order, { signal });
    priced(found);
    await survey(order, signal);
  } catch (error) {
    if (!(error instanceof Refusal)) {
      if (error.name !== "AbortError") throw error;
      return;
    }
    if (error.status === 503 || error.status === 429) again = setTimeout(look, 1000 * (error.after ?? 5));
    else if (error.code !== UNREACHABLE) refused(error);
  }
}

function priced({ price, seconds: takes, wait_seconds: waits, pictures, notes }) {
  const node = $("price");
  const most = price.most_micros ? `at most ${money(price.most_micros, price.currency)}` : "free";
  const time = `about ${seconds(takes)}`;
  const parts = [h("b", {}, most), ` · ${time}`];
  if (pictures > 1) parts.push(` for ${pictures}`);
  if (waits > 1) parts.push(h("span", { class: "aside" }, `after ${seconds(waits)} of others`));
  parts.push(...notes.map((text) => h("span", { class: "aside" }, sentence(text))));
  node.replaceChildren(...parts);
  node.classList.remove("waiting");
  clearField();
  $("draw").disabled = false;
}

function refused(error) {
  $("price").replaceChildren(h("span", { class: "cannot" }, sentence(error.message)));
  $("price").classList.remove("waiting");
  $("preflight").replaceChildren();
  form.startSlot().mark([]);
  markField(error.param);
}

async function survey(order, signal) {
  let found;
  try {
    found = await post(form.moves() ? "v1/videos/preflight" : "v1/preflight", order, { signal });
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    form.startSlot().mark([]);
    $("preflight").replaceChildren(note("What will not survive is not known", error.message, []));
    return;
  }
  const wishes = found.prompt.wishes.filter(({ verdict }) => verdict !== "kept");
  const regions = (found.picture?.regions ?? []).filter(({ verdict }) => verdict !== "kept");
  form.startSlot().mark(regions);
  const notes = found.notes.map((text) => h("p", { class: "aside" }, sentence(text)));
  $("preflight").replaceChildren(...wishes.map(ofWish), ...(regions.length ? [ofRegions(regions)] : []), ...notes);
}

const FATE = { lost: "will be lost", worn: "will suffer" };

function ofWish({ what, verdict, reason, helps }) {
  return note(`${sentence(what).replace(/\.$/, "")} ${FATE[verdict]}`, reason, helps);
}

function ofRegions(regions) {
  const lost = regions.filter(({ verdict }) => verdict === "lost").length;
  const text = `${times(regions.length, "part")} of the picture ${lost ? FATE.lost : FATE.worn}`;
  return note(text, regions[0].reason, regions[0].helps);
}

function note(text, reason, helps) {
  const advice = helps.length ? h("ul", {}, helps.map((help) => h("li", {}, sentence(help)))) : null;
  return h("details", { class: "note" }, h("summary", {}, icon("warn"), h("span", {}, text)), h("p", {}, sentence(reason)), advice);
}

const PLACES = { size: ["width", "height"], image: ["start"], mask: ["start"], "inpaint.padding": ["start"] };

/** Mark the field that an error is about. */
export function markField(param) {
  clearField();
  for (const id of PLACES[param] ?? [param]) {
    if (!id || !/^[a-z]+$/.test(id)) continue;
    const node = $(id);
    if (node?.matches("input, select, textarea")) node.setAttribute("aria-invalid", "true");
  }
}

function clearField() {
  $("form").querySelectorAll("[aria-invalid]").forEach((node) => node.removeAttribute("aria-invalid"));
}
