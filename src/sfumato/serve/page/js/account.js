// Who draws: the key, where the server has keys, and what was spent with it.

import { Refusal, get, key, setKey } from "./api.js";
import { $, h } from "./dom.js";
import { isOpen, listen } from "./jobs.js";
import { money, times, trouble } from "./words.js";

export function begin() {
  document.addEventListener("key-wanted", () => wanted());
  $("account").addEventListener("click", opened);
  $("key-form").addEventListener("submit", entered);
  $("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
  $("key-dialog").addEventListener("close", ask); // a browser lets nobody be kept from Escape twice
  $("leave").addEventListener("click", () => {
    setKey(null);
    location.reload();
  });
  listen((job, what) => {
    if (job !== null && what === "state" && !isOpen(job)) spent();
  });
}

/** Ask for a key. */
function wanted() {
  if ($("key-dialog").open) return;
  if (key()) $("key-trouble").textContent = "This key is not in use (any more).";
  setKey(null);
  ask();
}

function ask() {
  $("key-dialog").showModal();
  $("key").focus();
}

async function entered(event) {
  event.preventDefault();
  const value = $("key").value.trim();
  if (!value) return;
  setKey(value, $("key-keep").checked);
  try {
    await get("v1/models");
    location.reload(); // what another key has drawn must not stay here
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    setKey(null);
    $("key-trouble").textContent = error.status === 401 ? "This key is not in use." : trouble(error).text;
    $("key").select();
  }
}

/** Show in the head what this month has cost. */
export async function spent() {
  const usage = await get("v1/usage").catch((error) => {
    if (error instanceof Refusal) return null;
    throw error;
  });
  if (!usage) return;
  const { spent_and_reserved_micros: used, budget_micros: budget } = usage.month;
  const words = used || budget ? money(used, usage.currency).replace("free", "nothing") : "free";
  $("account").replaceChildren(h("span", { class: "aside" }, "This month "), h("b", {}, words), ...(budget ? [` of ${money(budget, usage.currency)}`] : []));
  $("account").hidden = !(used || budget || key());
  return usage;
}

async function opened() {
  const usage = await spent();
  if (!usage) return;
  const days = usage.days.toReversed();
  const rows = days.map((day) => h("tr", {}, h("th", { scope: "row" }, day.day), h("td", {}, times(day.pictures, "picture")), h("td", {}, money(day.micros, usage.currency))));
  const table = h("table", { class: "usage" }, h("tbody", {}, rows));
  $("account-body").replaceChildren(days.length ? table : h("p", { class: "muted" }, "Nothing was drawn this month."));
  $("leave").hidden = !key();
  $("account-dialog").showModal();
}
