// Small things of the document.

export const $ = (id) => document.getElementById(id);

// An element: make("button", { class: "plain", onclick: ... }, "Rename"). Text is text, never markup.
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

export const show = (element, is = true) => { element.hidden = !is; };

// Write a mistake next to its field; an empty text takes it back.
export function complain(id, text = "") {
  $(`${id}-error`).textContent = text;
  const field = $(id);
  if (field?.matches("input, textarea")) text ? field.setAttribute("aria-invalid", "true") : field.removeAttribute("aria-invalid");
}

export function saveFile(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
