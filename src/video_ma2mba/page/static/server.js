// What is asked of the memory server. An error has a `message` for people, and the `code` and `param` of the server.

const GONE = "The server does not answer. Is it still running?";

export class ServerError extends Error {
  constructor(status, error = {}) {
    super(sentence(error.message ?? GONE));
    Object.assign(this, { status, code: error.code, param: error.param });
  }
}

// The server's words as a sentence.
function sentence(text) {
  const said = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.?!]$/.test(said) ? said : `${said}.`;
}

async function request(method, path, body, signal) {
  let response;
  try {
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(0);
  }
  if (!response.ok) throw new ServerError(response.status, (await response.json().catch(() => ({}))).error);
  return response;
}

const json = async (...args) => (await request(...args)).json();
const of = (id) => `/v1/memories/${encodeURIComponent(id)}`;

export const about = () => json("GET", "/v1/about");
export const memories = () => json("GET", "/v1/memories?limit=1000").then((listed) => listed.data);
export const memory = (id) => json("GET", of(id));
export const rename = (id, name) => json("PATCH", of(id), { name });
export const remove = (id) => json("DELETE", of(id));
export const stills = (id) => json("GET", `${of(id)}/stills`);
export const stillUrl = (id, number) => `${of(id)}/stills/${number}`;
export const videoUrl = (id) => `${of(id)}/video`;
export const exportUrl = (id) => `${of(id)}/export`;

export async function hasVideo(id) {
  const response = await fetch(videoUrl(id), { headers: { Range: "bytes=0-0" } }).catch(() => null);
  return Boolean(response?.ok);
}

export async function example() {
  const blob = await (await request("GET", "/page/example.mp4")).blob();
  return new File([blob], "example.mp4", { type: blob.type });
}

// Send a video. XMLHttpRequest, since it tells how far it is; `signal` breaks it off.
export function upload(file, fields, onSent, signal) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append("file", file, file.name);
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", "/v1/memories");
    sending.responseType = "json";
    sending.upload.onprogress = (event) => onSent(event.loaded / (event.total || 1));
    sending.onload = () => {
      if (sending.status < 400) resolve(sending.response);
      else reject(new ServerError(sending.status, sending.response?.error));
    };
    sending.onerror = () => reject(new ServerError(0));
    sending.onabort = () => reject(new DOMException("broken off", "AbortError"));
    signal.addEventListener("abort", () => sending.abort());
    sending.send(form);
  });
}

// Calls `onChange` with what the server says of a memory until it is whole, failed or deleted, and with null while the
// server does not answer; returns what ends it.
export function follow(id, onChange) {
  let events, waiting;
  const close = () => { events.close(); clearTimeout(waiting); };
  const tell = (now) => {
    if (["ready", "failed", "deleted"].includes(now.status)) close();
    onChange(now);
  };
  const connect = () => {
    events = new EventSource(`${of(id)}/events`);
    events.onmessage = (event) => { if (event.data !== "[DONE]") tell(JSON.parse(event.data)); };
    events.onerror = () => {
      onChange(null);
      if (events.readyState !== EventSource.CLOSED) return; // it tries again by itself
      memory(id).catch((error) => { if (error.status === 404) tell({ id, status: "deleted" }); });
      waiting = setTimeout(connect, 2000);
    };
  };
  connect();
  return close;
}

// The text of an answer, as it comes.
export async function* answer(messages, signal) {
  const response = await request("POST", "/v1/chat/completions", { messages, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ServerError(0);
    });
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new ServerError(response.status, chunk.error);
      for (const choice of chunk.choices) if (choice.delta.content) yield choice.delta.content;
    }
  }
}
