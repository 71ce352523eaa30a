// What is wrong with what is on the page now: controls without a name, things that stick out or are cut at the side,
// text with too little contrast. A list of sentences; run by `test_ui.py`.
() => {
  const wrong = [];
  const isSeen = (element) => element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;
  const called = (element) => `${element.tagName.toLowerCase()}#${element.id}.${element.className} "${element.textContent.trim().slice(0, 30)}"`;

  for (const control of document.querySelectorAll("button, a, input, textarea, summary, video, progress")) {
    if (!isSeen(control)) continue;
    const labels = [...(control.labels ?? [])].map((label) => label.textContent).join("");
    const name = control.getAttribute("aria-label") || labels || control.textContent;
    if (!name.trim()) wrong.push(`${called(control)} has no name`);
  }

  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) wrong.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const element of document.querySelectorAll("main *, header *")) {
    if (!isSeen(element) || element.closest(".hidden, .skip, .ticks, .pins")) continue;
    const box = element.getBoundingClientRect();
    if (box.right > width + 1 || box.left < -1) wrong.push(`${called(element)} sticks out`);
  }

  const rgb = (colour) => { const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number); return { r, g, b, a }; };
  const light = ({ r, g, b }) => {
    const [x, y, z] = [r, g, b].map((c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour.a === 1) return colour;
    }
    return { r: 255, g: 255, b: 255 };
  };
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!hasText || !isSeen(element) || element.closest(".hidden, .skip, option") || element.disabled) continue;
    const [one, other] = [light(rgb(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (other + 0.05);
    if (contrast < 4.5) wrong.push(`${called(element)} has a contrast of ${contrast.toFixed(1)}`);
  }
  return wrong;
}
