// Numbers and times as people read them.

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (number) => whole.format(Math.round(number));

export const compact = (number) => (number < 10_000 ? count(number) : short.format(number));

/** Three figures are enough. */
export function figure(number) {
  if (number >= 100) return compact(number);
  return number >= 10 ? number.toFixed(1) : number.toFixed(number === 0 ? 0 : 2);
}

export const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)}`;

/** Milliseconds as `[number, unit]`. */
export function milliseconds(ms) {
  return ms < 1000 ? [figure(ms), "ms"] : [figure(ms / 1000), "s"];
}

export const seconds = (ms) => milliseconds(ms).join(" ");

export function uptime(total) {
  const minutes = Math.floor(total / 60);
  if (minutes < 1) return `${Math.floor(total)} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}

export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** The heading under which a chat of this time stands. */
export function day(time, now = Date.now()) {
  const midnight = new Date(now).setHours(0, 0, 0, 0);
  const age = Math.ceil((midnight - time) / 86_400_000);
  if (age <= 0) return "Today";
  if (age === 1) return "Yesterday";
  return age <= 7 ? "Last 7 days" : "Earlier";
}
