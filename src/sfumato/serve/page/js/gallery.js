// All pictures and clips of this key, the newest first.

import { $, h } from "./dom.js";
import { hasMore, isClip, listen, load, newestFirst, outputs, thumbs, title } from "./jobs.js";
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
  $("gallery").hidden = !wanted.length && !hasMore();
  $("gallery-aside").textContent = newestFirst().some(isClip) ? String(wanted.length) : times(wanted.length, "picture");
  $("older").hidden = !hasMore();
  mark();
}

function tile(job, index, path, pick) {
  const name = title(job);
  const picture = h("img", { alt: "" });
  picture.dataset.path = thumbs(job)[index];
  const button = h("button", { type: "button", class: "tile", "aria-label": name }, picture, h("span", { class: "caption", "aria-hidden": "true" }, name), isClip(job) ? h("span", { class: "badge", icon: "clip" }) : null);
  if (isClip(job)) moving(button, picture, job, path);
  button.addEventListener("click", () => pick(job, index));
  seen.observe(picture);
  return h("li", {}, button);
}

/** A clip is fetched and plays while it is pointed at. */
function moving(button, picture, job, path) {
  const film = !["gif", "webp"].includes(job.format);
  let clip = null;
  const play = () => {
    if (clip) return;
    clip = film ? h("video", { loop: true, playsinline: true }) : h("img", { alt: "" });
    if (film) clip.muted = clip.autoplay = true;
    picture.after(clip);
    show(clip, path);
  };
  const rest = () => {
    clip?.remove();
    clip = null;
  };
  for (const event of ["mouseenter", "focus"]) button.addEventListener(event, play);
  for (const event of ["mouseleave", "blur"]) button.addEventListener(event, rest);
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
