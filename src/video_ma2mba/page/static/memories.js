// The list of memories: open, rename, export, delete.

import { $, complain, make, show } from "./dom.js";
import * as server from "./server.js";
import { clock } from "./times.js";

export class MemoryList {
  constructor({ onOpen, onRenamed, onDeleted }) {
    Object.assign(this, { onOpen, onRenamed, onDeleted, current: null, items: [], told: new Map(), failed: false });
  }

  async refresh() {
    this.told.clear(); // what is said of one of them while the list is on its way is newer
    try {
      this.items = (await server.memories()).map((item) => ({ ...item, ...this.told.get(item.id) }));
    } catch (error) {
      this.failed = true;
      return complain("list", error.message);
    }
    if (this.failed) complain("list"); // what others said there stays
    this.failed = false;
    this.#draw();
  }

  select(id) {
    this.current = id;
    this.#draw();
  }

  // What the server said of one of them last.
  update(memory) {
    this.told.set(memory.id, memory);
    this.items = this.items.map((item) => (item.id === memory.id ? { ...item, ...memory } : item));
    const entry = this.facts?.get(memory.id);
    if (entry) entry.textContent = facts(memory);
  }

  #draw() {
    this.facts = new Map();
    show($("no-memories"), !this.items.length);
    $("list").replaceChildren(...this.items.map((item) => this.#entry(item)));
  }

  #entry(item) {
    const isCurrent = item.id === this.current;
    const picture = item.has_stills ? make("img", { src: server.stillUrl(item.id, 0), alt: "", loading: "lazy" }) : make("span", { class: "blank" });
    const said = make("span", { class: "quiet small" }, facts(item));
    this.facts.set(item.id, said);
    const open = make("button", { type: "button", class: "open", "aria-current": isCurrent ? "true" : null, onclick: () => this.onOpen(item.id) },
      picture, make("span", { class: "name" }, item.name), said);
    const menu = make("details", { class: "menu" }, make("summary", { "aria-label": `More about ${item.name}` }, "⋯"));
    const below = make("div", { class: "below" });
    menu.append(make("div", { class: "actions" },
      make("button", { type: "button", onclick: () => { menu.open = false; this.#rename(item, below); } }, "Rename"),
      item.status === "ready" ? make("a", { href: server.exportUrl(item.id), download: true, onclick: () => { menu.open = false; } }, "Export") : "",
      make("button", { type: "button", onclick: () => { menu.open = false; this.#delete(item, below); } }, "Delete")));
    menu.addEventListener("toggle", () => {
      if (menu.open) document.querySelectorAll("details.menu[open]").forEach((other) => { if (other !== menu) other.open = false; });
    });
    menu.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && menu.open) { menu.open = false; menu.firstChild.focus(); }
    });
    return make("li", { class: isCurrent ? "current" : null }, open, menu, below);
  }

  #rename(item, below) {
    const field = make("input", { "aria-label": `New name of ${item.name}`, maxlength: "200" });
    const said = make("p", { class: "error", role: "alert" });
    const form = make("form", { class: "row" }, field, make("button", { class: "main" }, "Rename"));
    field.value = item.name;
    field.addEventListener("keydown", (event) => { if (event.key === "Escape") below.replaceChildren(); });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (!field.value.trim()) { said.textContent = "Give it a name."; return; }
      try {
        this.onRenamed(await server.rename(item.id, field.value.trim()));
        await this.refresh();
      } catch (error) {
        said.textContent = error.message;
      }
    });
    below.replaceChildren(form, said);
    field.select();
  }

  #delete(item, below) {
    const said = make("p", { class: "error", role: "alert" });
    const sure = make("button", { type: "button", class: "main", onclick: async () => {
      try {
        await server.remove(item.id);
        this.onDeleted(item.id);
        await this.refresh();
      } catch (error) {
        said.textContent = error.message;
      }
    } }, "Delete");
    below.replaceChildren(make("p", { class: "small" }, "Delete this memory for good?"),
      make("div", { class: "row" }, sure, make("button", { type: "button", onclick: () => below.replaceChildren() }, "Keep it")), said);
    sure.focus();
  }
}

function facts(item) {
  const made = new Date(1000 * item.created), isRecent = Date.now() - made < 300 * 24 * 3600 * 1000;
  const date = made.toLocaleDateString(undefined, { day: "numeric", month: "short", year: isRecent ? undefined : "numeric" });
  if (item.status === "failed") return "could not be watched";
  if (item.status !== "ready") {
    const { num_frames: done, expected } = item.progress ?? {};
    return expected ? `${Math.floor((100 * done) / expected)}\u00a0% watched` : "not watched yet";
  }
  return `${clock(item.fps ? item.num_frames / item.fps : item.duration_s)} · ${date}`;
}
