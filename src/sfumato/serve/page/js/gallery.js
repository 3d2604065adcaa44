// All pictures and clips of this key, the newest first.

import { $, h } from "./dom.js";
import { hasMore, isClip, listen, load, newestFirst, outputs, title } from "./jobs.js";
import { show } from "./pictures.js";
import { shown } from "./stage.js";
import { times } from "./words.js";

const tiles = new Map(); // path → element
let seen;

/** pick(job, index): shows it on the stage. */
export function begin(pick, attempt) {
  seen = new IntersectionObserver(appear, { rootMargin: "400px" });
  listen((job, what) => {
    if (what === "all" || (what === "state" && job.state === "succeeded")) arrange(pick);
  });
  document.addEventListener("staged", mark);
  $("older").addEventListener("click", () => attempt(() => load(true)));
  $("tiles").addEventListener("keydown", walk);
}

function arrange(pick) {
  const wanted = [];
  for (const job of newestFirst()) {
    if (job.state !== "succeeded") continue;
    outputs(job).forEach((path, index) => {
      if (!tiles.has(path)) tiles.set(path, tile(job, index, path, pick));
      wanted.push(tiles.get(path));
    });
  }
  const list = $("tiles");
  wanted.forEach((node, k) => list.children[k] !== node && list.insertBefore(node, list.children[k] ?? null));
  $("gallery").hidden = !wanted.length;
  $("gallery-aside").textContent = newestFirst().some(isClip) ? String(wanted.length) : times(wanted.length, "picture");
  $("older").hidden = !hasMore();
  mark();
}

function tile(job, index, path, pick) {
  const clip = isClip(job) && !["gif", "webp"].includes(job.format);
  const name = title(job);
  const media = clip ? h("video", { muted: true, loop: true, playsinline: true, preload: "metadata" }) : h("img", { alt: "" });
  if (clip) media.muted = true;
  media.dataset.path = path;
  const button = h("button", { type: "button", class: "tile", "aria-label": name }, media, h("span", { class: "caption", "aria-hidden": "true" }, name), clip ? h("span", { class: "badge", icon: "clip" }) : null);
  if (clip) {
    for (const event of ["mouseenter", "focus"]) button.addEventListener(event, () => media.play().catch(() => {}));
    for (const event of ["mouseleave", "blur"]) button.addEventListener(event, () => media.pause());
  }
  button.addEventListener("click", () => pick(job, index));
  seen.observe(media);
  return h("li", {}, button);
}

function appear(entries) {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    show(target, target.dataset.path);
  }
}

/** Which of them is on the stage. */
function mark() {
  const { job, index } = shown();
  const path = job && outputs(job)[index];
  for (const [each, node] of tiles) node.firstChild.setAttribute("aria-current", String(each === path));
}

/** Arrow keys go from one to the next. */
function walk(event) {
  const buttons = [...$("tiles").querySelectorAll(".tile")];
  const at = buttons.indexOf(document.activeElement);
  const across = getComputedStyle($("tiles")).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
  if (at < 0 || !step || !buttons[at + step]) return;
  event.preventDefault();
  buttons[at + step].focus();
}
