// Talks to the REST API with the visitor's key, and follows a job's events over connections that may break.

const KEY = "noisemill-key";

/** The key from the address (`#key=…`, removed from it at once) or from this tab's memory. */
export function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem(KEY, given);
    history.replaceState(null, "", location.pathname + location.search);
  }
  return sessionStorage.getItem(KEY);
}

export function forgetKey() {
  sessionStorage.removeItem(KEY);
}

let asking = null;

/** Ask for the key once, however many requests want it. */
function askKey(why) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("ask");
    const input = document.getElementById("key");
    document.getElementById("why").textContent = why;
    input.value = "";
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(KEY, input.value.trim());
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export class Refused extends Error {
  constructor(status, problem) {
    super(problem?.detail || problem?.title || `the server answered ${status}`);
    this.status = status;
  }
}

/** One request. Asks for a key when there is none, or not a valid one. */
export async function request(path, options = {}) {
  if (!takeKey()) await askKey("");
  const headers = { ...options.headers, Authorization: `Bearer ${takeKey()}` };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name !== "AbortError") showLink(false);
    throw error;
  }
  showLink(answer.status < 500);
  if (answer.status === 401) {
    await askKey("This key is not valid.");
    return request(path, options);
  }
  if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => null));
  return answer;
}

export async function get(path) {
  return (await request(path)).json();
}

function showLink(isUp) {
  const link = document.getElementById("link");
  link.textContent = isUp ? "live" : "no connection";
  link.classList.toggle("away", !isUp);
  document.getElementById("forget").hidden = !takeKey();
}

/** Call `onEvent` for every event of a job, once and in order, until the job has ended. */
export async function follow(path, onEvent) {
  let last = 0;
  for (let failures = 0; ;) {
    try {
      const answer = await request(path, { headers: { Accept: "text/event-stream", "Last-Event-ID": String(last) } });
      if (answer.status === 204) return;
      for await (const event of messages(answer.body)) {
        if (event.seq <= last) continue;
        last = event.seq;
        failures = 0;
        onEvent(event);
      }
    } catch (error) {
      if (error instanceof Refused && error.status < 500) throw error;
      failures += 1;
    }
    await new Promise((resolve) => setTimeout(resolve, Math.min(500 * 2 ** failures, 8000)));
  }
}

/** The JSON events of a stream of server-sent events. EventSource would do, but cannot send the key. */
async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}
