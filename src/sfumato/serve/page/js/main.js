// The page put together: models and jobs fetched, the form's button, and what goes wrong shown in one place.

import * as account from "./account.js";
import { Refusal, get } from "./api.js";
import { $, drawIcons, h, later, wait } from "./dom.js";
import * as estimate from "./estimate.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as health from "./health.js";
import { isOpen, listen, load, newestFirst, submit } from "./jobs.js";
import * as queue from "./queue.js";
import * as stage from "./stage.js";
import { trouble } from "./words.js";

let started = false;
let countdown;

/** Do what a button is for, and show what goes wrong beside the button that draws. */
async function attempt(work) {
  hush();
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.code !== "invalid_api_key") complain(error);
    return null;
  }
}

function complain(error) {
  const { title, text } = trouble(error);
  const after = h("p", { class: "after" });
  $("trouble").replaceChildren(h("b", {}, title), h("p", {}, text), after);
  $("trouble").hidden = false;
  estimate.markField(error.param);
  let left = error.after;
  const tick = () => {
    after.textContent = left > 0 ? `Try again in ${left} s.` : error.after ? "Now it may be tried again." : "";
    left -= 1;
  };
  tick();
  if (error.after) countdown = setInterval(tick, 1000);
}

function hush() {
  clearInterval(countdown);
  $("trouble").hidden = true;
}

function pick(job, index = 0) {
  stage.show(job, index);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("stage").scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

async function draw(event) {
  event.preventDefault();
  const button = $("draw");
  if (button.disabled) return;
  button.disabled = true;
  const job = await attempt(() => submit(form.read({ seeded: true }), form.moves()));
  button.disabled = false;
  if (job) pick(job);
}

async function start() {
  if (started) return;
  try {
    const [models] = await Promise.all([get("v1/models"), load()]);
    started = true;
    form.build(models.data);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.code !== "invalid_api_key") complain(error);
    return;
  }
  hush();
  estimate.begin();
  estimate.look();
  account.spent();
  const again = later(400, estimate.look); // what others keep it waiting, changes when one of them ends
  listen((job, what) => job !== null && what === "state" && !isOpen(job) && again());
  const latest = newestFirst().find((job) => ["queued", "running", "succeeded"].includes(job.state));
  if (latest) stage.show(latest);
  else stage.empty();
}

drawIcons();
account.begin();
stage.begin(attempt);
stage.waiting();
queue.begin(pick, attempt);
gallery.begin(pick, attempt);
$("form").addEventListener("submit", draw);
$("form").addEventListener("input", hush);
$("light-close").addEventListener("click", () => $("light").close());
$("light").addEventListener("click", (event) => event.target.id !== "light-close" && $("light").close());
// on a phone the bar lies over the page, which must end above it
new ResizeObserver(() => document.documentElement.style.setProperty("--act", `${$("act").offsetHeight}px`)).observe($("act"));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) $("form").requestSubmit();
});
document.addEventListener("visibilitychange", () => {
  if (started && !document.hidden) load().catch((error) => error instanceof Refusal || Promise.reject(error));
});
health.begin(() => (started ? load().then(estimate.look) : start()));
await wait(0);
await start();
