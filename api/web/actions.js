// What may be done to a job in its state, as buttons.

import { Refused, request } from "./api.js";
import { el } from "./dom.js";

const ACTIONS = [
  { name: "pause", label: "Pause", states: ["queued", "running"] },
  { name: "pause", label: "Pausing…", states: ["pausing"], waits: true },
  { name: "resume", label: "Resume", states: ["paused", "pausing"] },
  { name: "retry", label: "Retry", states: ["failed", "canceled", "expired"], unless: (job) => job.retried_by },
  { name: "reproduce", label: "Reproduce", states: ["succeeded"] },
  { name: "cancel", label: "Cancel", states: ["queued", "running", "pausing", "paused"], danger: true },
  { name: "cancel", label: "Canceling…", states: ["canceling"], danger: true, waits: true },
  { name: "delete", label: "Delete", states: ["succeeded", "failed", "canceled", "expired"], danger: true },
];

/** The buttons of a job; `done` is called after what one did, `refused` with what the server said against it. */
export function buttons(job, done, refused) {
  return ACTIONS.filter((action) => action.states.includes(job.state) && !action.unless?.(job)).map((action) => {
    const button = el("button", { class: action.danger ? "danger" : null, disabled: action.waits, onclick: press }, action.label);
    async function press() {
      if (action.name === "delete" && !confirm("Delete this job with its log and artifacts? Models and datasets stay.")) return;
      button.disabled = true;
      try {
        await act(job, action.name);
        await done();
      } catch (error) {
        button.disabled = false;
        if (!(error instanceof Refused)) throw error;
        refused(error.message);
      }
    }
    return button;
  });
}

async function act(job, name) {
  const path = `/v1/jobs/${job.id}`;
  if (name === "delete") {
    await request(path, { method: "DELETE" });
    location.assign("/");
  } else {
    const answer = await request(`${path}/${name}`, { method: "POST" });
    if (["retry", "reproduce"].includes(name)) location.assign(`/jobs/${(await answer.json()).id}`);
  }
}
