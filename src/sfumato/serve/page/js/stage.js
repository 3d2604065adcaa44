// The picture in the middle: forming, done with its recipe and its bill, or nothing yet.

import * as actions from "./actions.js";
import { called } from "./adapters.js";
import { $, h } from "./dom.js";
import * as form from "./form.js";
import { icon } from "./icons.js";
import { cancel, isClip, isOpen, listen, outputs, receipt, thumbs, title } from "./jobs.js";
import { show as showPicture } from "./pictures.js";
import { money, seconds, size, trouble } from "./words.js";

const EXAMPLES = [
  "a red metal sphere behind a small blue cube",
  "two yellow spheres",
  "a large green rubber cylinder",
];

const ENLARGED = 3.5; // times, on the stage
const LEAST = 320; // pixels of the screen
const SHORT = 16; // letters, of which two stand in a row of the recipe

let job = null;
let index = 0;
let parts = {}; // what of the stage changes while it is drawn
let tried = () => {};

/** attempt(work): runs what a button does, and shows what goes wrong. */
export function begin(attempt) {
  tried = attempt;
  listen((changed, what) => {
    if (changed !== null && changed === job) what === "state" ? render() : progress();
  });
  empty();
}

export const shown = () => ({ job, index });

/** Bring a picture of a job here. */
export function show(other, place = 0) {
  [job, index] = [other, place];
  render();
  document.dispatchEvent(new CustomEvent("staged"));
}

export function empty() {
  job = null;
  const chips = EXAMPLES.map((text) => {
    const chip = h("button", { type: "button", class: "chip" }, text);
    chip.addEventListener("click", () => {
      $("prompt").value = text;
      $("form").dispatchEvent(new Event("input"));
      $("prompt").focus();
    });
    return chip;
  });
  $("stage").className = "stage bare";
  $("stage").replaceChildren(
    h("div", { class: "hello" },
      h("img", { src: "page/empty.svg", alt: "", width: 240, height: 180 }),
      h("h2", {}, "Nothing drawn yet"),
      h("p", { class: "muted" }, "Describe a picture and draw it. Or begin with one of these:"),
      h("div", { class: "chips" }, chips)),
  );
}

/** While the server's jobs are being fetched. */
export function waiting() {
  $("stage").className = "stage";
  $("stage").replaceChildren(h("div", { class: "frame shimmer" }), h("div", { class: "facts" }, h("div", { class: "line shimmer" }), h("div", { class: "line short shimmer" })));
}

const SAID = { queued: "It waits for its turn.", running: "It is being drawn.", succeeded: "It is done.", failed: "It failed.", cancelled: "It is cancelled." };

function render() {
  parts = {};
  const focused = $("stage").contains(document.activeElement);
  $("stage").className = `stage ${job.state}`;
  $("stage").dataset.job = job.id;
  measure($("stage"));
  if (isOpen(job)) forming();
  else if (job.state === "succeeded") done();
  else failed();
  $("said").textContent = SAID[job.state];
  if (focused) $("stage").querySelector(".facts button")?.focus({ preventScroll: true });
}

const frame = (...children) => h("div", { class: "frame" }, children);

/** Give what is shown the picture's shape, and do not blow up a small one too far. */
function measure(node) {
  const [width, height] = job.expected.size;
  node.style.setProperty("--shape", width / height);
  node.style.setProperty("--most", `${Math.max(LEAST, ENLARGED * width)}px`);
}

const heading = () => h("h2", { class: "said" }, title(job));

// --- forming ---------------------------------------------------------------------------------------------------------

function forming() {
  parts.preview = h("img", { class: "preview", alt: "The picture as it forms" });
  parts.frame = frame(parts.preview);
  parts.bar = h("progress", { max: 1, value: 0, "aria-label": "How far the picture is" });
  parts.words = h("p", { class: "status" });
  parts.more = h("p", { class: "muted" });
  const stop = h("button", { type: "button" }, "Cancel");
  stop.addEventListener("click", () => {
    stop.disabled = true;
    tried(() => cancel(job));
  });
  const { price } = job;
  const cost = price.reserved_micros ? `Costs at most ${money(price.reserved_micros, price.currency)}; if it is cancelled, nothing.` : "";
  $("stage").replaceChildren(
    parts.frame,
    h("div", { class: "facts" }, heading(), parts.words, parts.bar, parts.more, h("p", { class: "muted" }, cost), h("div", { class: "buttons" }, stop)),
  );
  progress();
}

function progress() {
  if (!parts.bar) return;
  if (job.preview && parts.preview.src !== job.preview) parts.preview.src = job.preview;
  parts.frame.classList.toggle("shimmer", !job.preview);
  parts.preview.hidden = !job.preview;
  const left = job.expected.seconds * (1 - (job.progress ?? 0));
  if (job.state === "queued") {
    parts.bar.removeAttribute("value");
    parts.words.textContent = job.position ? `Waiting, ${job.position} before it` : "Waiting for its turn";
    parts.more.textContent = `Then about ${seconds(left)}`;
  } else {
    parts.bar.value = job.progress ?? 0;
    parts.words.textContent = job.step ? `Step ${job.step} of ${job.steps}` : "Beginning";
    parts.more.textContent = job.progress === 1 ? "Decoding" : `About ${seconds(left)} left`;
  }
}

// --- done ------------------------------------------------------------------------------------------------------------

function done() {
  const paths = outputs(job);
  index = Math.min(index, paths.length - 1);
  const clip = isClip(job) && job.format !== "gif" && job.format !== "webp";
  const main = clip
    ? h("video", { class: "final", controls: true, loop: true, muted: true, playsinline: true, autoplay: true, "aria-label": title(job) })
    : h("img", { class: "final", alt: title(job) });
  if (clip) main.muted = true;
  showPicture(main, paths[index]);
  const under = job.preview ? h("img", { class: "preview", src: job.preview, alt: "" }) : null;
  const bill = h("dl", { class: "recipe" });
  $("stage").replaceChildren(
    h("div", { class: "shown" }, frame(under, clip ? main : enlarger(main)), paths.length > 1 ? strip(thumbs(job)) : null),
    h("div", { class: "facts" }, heading(), h("p", { class: "verdict", role: "status" }), buttons(main), h("p", { class: "muted" }, each()), bill),
  );
  recipe(bill);
  verdict();
}

function strip(paths) {
  return h("div", { class: "strip", role: "group", "aria-label": "Pictures of this job" }, paths.map((path, place) => {
    const picture = h("img", { alt: `Picture ${place + 1}` });
    showPicture(picture, path);
    const button = h("button", { type: "button", "aria-pressed": String(place === index) }, picture);
    button.addEventListener("click", () => {
      show(job, place);
      $("stage").querySelectorAll(".strip button")[place].focus();
    });
    return button;
  }));
}

/** What the buttons that draw at once will cost. */
function each() {
  const { charged_micros: paid, currency } = job.price;
  const verbs = isClip(job) ? "Make again draws" : "Make again and Vary draw";
  return paid ? `${verbs} at once, for about ${money(paid / outputs(job).length, currency)}.` : "";
}

function buttons(main) {
  const [of, place] = [job, index];
  const one = (icon, text, work, kind = "") => {
    const node = h("button", { type: "button", class: kind, icon }, text);
    node.addEventListener("click", () => tried(async () => {
      const made = await work();
      if (made) show(made);
    }));
    return node;
  };
  const still = !isClip(of);
  return h("div", { class: "buttons actions" },
    one("again", "Make again", () => actions.again(of, place)),
    still ? one("vary", "Vary", () => actions.vary(of, place)) : null,
    one("start", still ? "Use as start" : "Use this frame", () => actions.beginWith(of, place, main)),
    still ? one("brush", "Paint over", () => actions.beginWith(of, place, main, { mask: true })) : null,
    still && form.animator() ? one("clip", "Animate", () => actions.animate(of, place, main)) : null,
    one("sliders", "Take settings", () => form.write(of, actions.seedOf(of, place))),
    one("down", "Save", () => actions.save(of, place)),
  );
}

async function recipe(list) {
  const of = job;
  const fill = () => of === job && list.replaceChildren(...lines(of).map(([name, value]) => (
    h("div", { class: value.length > SHORT && "long" }, h("dt", {}, name), h("dd", {}, value)))));
  fill();
  try {
    of.receipt ??= await receipt(of);
    fill();
  } catch {
    // the picture is there, and its bill is not: the rest is told without
  }
}

/** What a job was asked for and what it took, as [name, words]; what it left open is in its receipt. */
function lines(of) {
  const bill = of.receipt;
  const request = { ...bill?.recipe?.request, ...of.request };
  const { charged_micros: paid, reserved_micros: most, currency } = of.price;
  const variation = request.variation && `${request.variation.strength} towards ${request.variation.seed}`;
  const cost = [
    money(paid, currency),
    paid && paid < most ? `of ${money(most, currency)} at most` : null,
    outputs(of).length > 1 ? `for ${outputs(of).length}` : null,
  ];
  return Object.entries({
    Model: of.model,
    Negative: request.negative,
    Seed: actions.seedOf(of, index),
    Size: size(of.expected.size),
    Frames: request.frames,
    Steps: request.steps ?? of.expected.steps,
    Guidance: request.guidance,
    Sampler: [request.sampler, request.schedule].filter(Boolean).join(", "),
    Variation: variation,
    "Begins with": of.request.mask ? "a picture and a mask" : of.request.image && "a picture",
    LoRAs: request.loras?.map((use) => `${called(use.name ?? use)} ${use.weight ?? 1}`).join(", "),
    Follows: request.controls?.map((use) => `${use.name} ${use.weight ?? 1}`).join(", "),
    Took: bill && `${seconds(bill.seconds)}, where ${seconds(bill.expected_seconds)} were expected`,
    Energy: bill?.joules && `${bill.joules.toFixed(0)} J`,
    Cost: cost.filter(Boolean).join(", "),
  }).filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => [name, String(value)]);
}

/** Whether a picture that was made again is the same. */
async function verdict() {
  const of = job;
  if (!of.like) return;
  of.verdict ??= await actions.compared(of);
  const node = $("stage").querySelector(".verdict");
  if (of === job && node) node.textContent = of.verdict;
}

/** The picture as a button that shows it large. */
function enlarger(main) {
  const button = h("button", { type: "button", class: "enlarge", "aria-label": `Show it large: ${title(job)}` }, main);
  button.addEventListener("click", () => enlarge(main));
  return button;
}

function enlarge(main) {
  const copy = h("img", { src: main.src, alt: main.alt });
  $("light-body").replaceChildren(copy);
  measure(copy);
  $("light").showModal();
}

// --- neither ---------------------------------------------------------------------------------------------------------

/** In place of a picture that never was. */
function nothing(gone) {
  const sign = icon(gone ? "picture" : "warn");
  sign.classList.add("nothing");
  return sign;
}

function failed() {
  const gone = job.state === "cancelled";
  const { title, text } = trouble(gone ? { code: "cancelled", message: "Nothing is charged for it." } : job.error ?? { code: "internal" });
  const retry = h("button", { type: "button", icon: "again" }, "Try again");
  const of = job;
  retry.addEventListener("click", () => tried(async () => show(await actions.retry(of))));
  const picture = of.preview ? h("img", { class: "preview faded", src: of.preview, alt: "" }) : null;
  $("stage").replaceChildren(
    frame(picture ?? nothing(gone)),
    h("div", { class: "facts" }, heading(), h("div", { class: gone ? "quiet-note" : "trouble" }, h("b", {}, title), h("p", {}, text), gone ? null : h("p", {}, "What fails is free.")), h("div", { class: "buttons" }, retry)),
  );
}
