// Shows the turns of a conversation, and what comes in for the one that is being answered.

import { thumbElement } from "./thumbs.js";

const LABELS = { "visionq.caption": "Caption", "visionq.vqa": "VQA", "visionq.video_qa": "Video QA" };

export function label(task) {
  return LABELS[task] || task || "–";
}

/** Returns the turn's element with a method `show()` that draws the turn anew. */
export function turnElement(turn) {
  const item = document.createElement("li");
  const asked = make("div", "asked");
  if (turn.media.length) {
    const thumbs = make("ul", "thumbs");
    thumbs.append(...turn.media.map(thumbElement));
    asked.append(thumbs);
  }
  asked.append(make("div", "", turn.text || "Describe it."));
  const answer = make("div", "answer");
  const facts = make("p", "facts");
  item.append(asked, answer, facts);
  item.show = () => {
    answer.textContent = turn.answer;
    answer.setAttribute("aria-busy", String(turn.state === "asked"));
    facts.textContent = turn.facts;
    facts.classList.toggle("failed", ["failed", "expired"].includes(turn.state));
  };
  item.show();
  return item;
}

/** Take an event into a turn. Returns a sentence for the status line, or null when there is nothing to say. */
export function take(turn, event) {
  switch (event.type) {
    case "job.queued":
      return "queued";
    case "job.started":
      turn.answer = turn.facts = "";
      return "started";
    case "job.progress":
      return event.total > 1 ? `${event.stage} ${event.done} of ${event.total}` : event.stage;
    case "output.delta":
      turn.answer += event.text;
      return "answering";
    case "job.retrying":
      turn.answer = "";
      return `starting again (${event.reason})`;
    case "stream.gap":
      return "catching up";
    case "job.completed":
      return end(turn, "completed", event.result.text, summary(event.result));
    default:
      return end(turn, event.type.slice(4), event.partial_text || turn.answer, `${event.error.code}: ${event.error.message}`);
  }
}

function end(turn, state, answer, facts) {
  Object.assign(turn, { state, answer, facts });
  return state;
}

function summary({ usage, timings, finish_reason: reason, attempt }) {
  const parts = [`${usage.completion_tokens} tokens`, `${timings.total_s.toFixed(2)} s`];
  if (timings.first_token_s !== undefined && timings.first_token_s !== null) parts.push(`first token ${timings.first_token_s.toFixed(2)} s`);
  if (reason !== "stop") parts.push(reason);
  if (attempt > 1) parts.push(`attempt ${attempt}`);
  return parts.join(" · ");
}

function make(name, className, text = "") {
  return Object.assign(document.createElement(name), { className, textContent: text });
}
