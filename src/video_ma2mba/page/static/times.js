// Times: as they are read (h:mm:ss), as they are typed, and as a text names them.

// 70 -> "1:10", 4200 -> "1:10:00"; `long` writes the hour of short ones too.
export function clock(seconds, long = false) {
  const whole = Math.max(0, Math.floor(seconds + 1e-6));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h || long ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

// "1:10:00" -> 4200, "1:10" -> 70, "70" -> 70; NaN for what is no time.
export function parseTime(text) {
  const match = /^(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)$/.exec(text.trim());
  if (!match) return NaN;
  const [, h, m, s] = match;
  if ((m !== undefined && Number(s) >= 60) || (h !== undefined && Number(m) >= 60)) return NaN;
  return 3600 * Number(h ?? 0) + 60 * Number(m ?? 0) + Number(s);
}

const UNITS = { s: 1, sec: 1, second: 1, seconds: 1, min: 60, minute: 60, minutes: 60, h: 3600, hour: 3600, hours: 3600 };
const TIME = /(?<![\w:.])(\d+):([0-5]\d)(?::([0-5]\d))?(?![\d:])|(?<![\w:.])(\d+(?:\.\d+)?)\s*(s|sec|seconds?|min|minutes?|h|hours?)\b/gi;

// The times that a text names: [{ at, length, seconds }], in its order.
export function timesIn(text) {
  return [...text.matchAll(TIME)].map((match) => {
    const [said, first, second, third, number, unit] = match;
    const seconds = unit ? Number(number) * UNITS[unit.toLowerCase()]
      : third === undefined ? 60 * Number(first) + Number(second)
      : 3600 * Number(first) + 60 * Number(second) + Number(third);
    return { at: match.index, length: said.length, seconds };
  });
}

// Bytes as people read them, in binary units.
export function size(bytes) {
  for (const [unit, of] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (bytes >= of) return `${bytes >= 100 * of ? Math.round(bytes / of) : (bytes / of).toFixed(1)}\u00a0${unit}`;
  }
  return `${bytes}\u00a0bytes`;
}
