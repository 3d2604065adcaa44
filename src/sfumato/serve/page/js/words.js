// Money, time and what went wrong, in words.

import { UNREACHABLE } from "./api.js";

const TITLES = {
  [UNREACHABLE]: "The server does not answer",
  budget_exceeded: "Not enough money left this month",
  queue_full: "The queue is full",
  too_busy: "Too much is waiting",
  too_many_open: "Enough jobs are open",
  rate_limited: "That was quick",
  too_large: "That is too large",
  storage_quota: "No room for more pictures",
  storage_full: "No room for more pictures",
  deadline_exceeded: "It took too long",
  worker_lost: "The worker was lost",
  no_worker: "No worker is there",
  busy: "The server is busy",
  draining: "The server is stopping",
  ledger_unavailable: "Nothing can be written down now",
  file_gone: "A picture is not there any more",
  gone: "It is not kept any more",
  internal: "The server failed",
  forbidden: "This key may not draw",
  invalid_api_key: "This key is not in use",
  cancelled: "Cancelled",
};

/** An error of the server, or of a job: a title and a sentence. */
export function trouble(error) {
  const title = TITLES[error.code] ?? "That cannot be drawn";
  return { title, text: sentence(error.message ?? "") };
}

export function sentence(text) {
  const whole = text.trim();
  if (!whole) return "";
  return whole[0].toUpperCase() + whole.slice(1) + (/[.!?…]$/.test(whole) ? "" : ".");
}

/** Millionths of a currency; small amounts with two digits that count. */
export function money(micros, currency) {
  const amount = Number(micros) / 1e6;
  if (!amount) return "free";
  const digits = Math.min(6, Math.max(2, 1 - Math.floor(Math.log10(Math.abs(amount)))));
  try {
    const options = { style: "currency", currency, minimumFractionDigits: 2, maximumFractionDigits: digits };
    return new Intl.NumberFormat("en", options).format(amount);
  } catch {
    return `${amount.toFixed(digits)} ${currency}`;
  }
}

export function seconds(value) {
  if (value < 0.95) return `${Math.max(0.1, value).toFixed(1)} s`;
  if (value < 9.5) return `${value.toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

export const times = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

export const size = ([width, height]) => `${width} × ${height}`;
