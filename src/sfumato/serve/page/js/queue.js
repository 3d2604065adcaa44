// What waits and what is being drawn, with a way out for each.

import { $, h } from "./dom.js";
import { cancel, listen, open, title } from "./jobs.js";
import { seconds } from "./words.js";

const rows = new Map();

/** pick(job): shows it on the stage. attempt(work): runs what a button does. */
export function begin(pick, attempt) {
  listen((job) => {
    if (job === null || !rows.has(job.id) || !open().includes(job)) arrange(pick, attempt);
    else rows.get(job.id).update();
    if (job !== null) open().forEach((each) => rows.get(each.id)?.update());
  });
  $("cancel-all").addEventListener("click", () => attempt(() => Promise.all(open().map(cancel))));
}

function arrange(pick, attempt) {
  const found = open();
  for (const id of rows.keys()) if (!found.some((job) => job.id === id)) rows.delete(id);
  for (const job of found) if (!rows.has(job.id)) rows.set(job.id, row(job, pick, attempt));
  $("queue").hidden = !found.length;
  document.title = found.length ? `(${found.length}) Sfumato` : "Sfumato";
  $("cancel-all").hidden = found.length < 2;
  const list = $("queue-list");
  const wanted = found.map((job) => rows.get(job.id).node);
  if (wanted.length !== list.children.length || wanted.some((node, k) => list.children[k] !== node)) list.replaceChildren(...wanted);
}

function row(job, pick, attempt) {
  const picture = h("img", { alt: "", hidden: true });
  const words = h("span", { class: "muted" });
  const bar = h("progress", { max: 1, "aria-label": "How far it is" });
  const name = title(job);
  const show = h("button", { type: "button", class: "row-open" }, h("span", { class: "thumb" }, picture), h("span", { class: "row-text" }, h("span", { class: "row-name" }, name), words));
  const stop = h("button", { type: "button", class: "icon-button", icon: "close", "aria-label": `Cancel “${name}”`, title: "Cancel" });
  show.addEventListener("click", () => pick(job));
  stop.addEventListener("click", () => {
    stop.disabled = true;
    attempt(() => cancel(job));
  });
  const node = h("li", { class: "row-job" }, show, bar, stop);
  const update = () => {
    if (job.preview && picture.src !== job.preview) {
      picture.src = job.preview;
      picture.hidden = false;
    }
    if (job.state === "queued") {
      bar.value = 0;
      words.textContent = job.position ? `Waiting, ${job.position} before it` : "Waiting for its turn";
    } else {
      bar.value = job.progress ?? 0;
      words.textContent = job.step ? `Step ${job.step} of ${job.steps}` : `About ${seconds(job.expected.seconds)}`;
    }
  };
  update();
  return { node, update };
}
