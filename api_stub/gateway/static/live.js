// The live parts beside the conversation: the queues' numbers and the list of jobs, asked for every other second.

import { label } from "./turns.js";

const EVERY_MS = 2000;
const WINDOW_S = 10;

/** Counts tokens as they come and says how many there were per second. */
export class Speed {
  #tokens = [];

  add(count) {
    this.#tokens.push([performance.now() / 1000, count]);
  }

  perSecond() {
    const since = performance.now() / 1000 - WINDOW_S;
    this.#tokens = this.#tokens.filter(([when]) => when > since);
    return this.#tokens.reduce((sum, [, count]) => sum + count, 0) / WINDOW_S;
  }
}

/** Keep numbers, model list and job list fresh while the page can be seen. */
export function watch(page, api, speed, onTrouble) {
  const look = async () => {
    if (!document.hidden) {
      try {
        const [queues, jobs] = await Promise.all([api().queues(), api().jobs()]);
        showQueues(page, queues);
        showJobs(page, jobs);
        onTrouble(null);
      } catch (error) {
        onTrouble(error);
      }
      page.live("speed").textContent = speed.perSecond().toFixed(1);
    }
    setTimeout(look, EVERY_MS);
  };
  look();
}

function showQueues(page, queues) {
  const model = page.model.value || "default";
  const names = new Set(["default", ...queues.flatMap((queue) => [queue.model, ...adaptersOf(queue)])]);
  if (names.size !== page.model.options.length) {
    page.model.replaceChildren(...[...names].sort().map((name) => new Option(name, name)));
    page.model.value = names.has(model) ? model : "default";
  }
  const queue = queues.find((one) => one.model === page.model.value.split(":")[0]) || { depth: 0, waiting: 0, num_workers: 0 };
  page.live("queued").textContent = queue.paused ? `${queue.waiting}, paused` : queue.waiting;
  page.live("queued").title = queue.paused ? "An operator has paused this queue: jobs wait until it is resumed" : "";
  page.live("running").textContent = Math.max(queue.depth - queue.waiting, 0);
  page.live("workers").textContent = queue.num_workers;
  page.live("workers").title = (queue.serving || []).map(servedBy).join("\n");
}

function adaptersOf(queue) {
  const names = (queue.serving || []).flatMap((worker) => Object.keys(worker.adapters || {}));
  return [...new Set(names)].map((name) => `${queue.model}:${name}`);
}

// What a worker serves, since when, with which scores: for operators.
function servedBy(worker) {
  const since = new Date(worker.since * 1000).toLocaleString();
  const adapters = Object.keys(worker.adapters || {}).map((name) => ` +${name}`).join("");
  const scores = Object.entries(worker.scores || {}).map(([name, value]) => ` ${name} ${value.toFixed(3)}`).join("");
  return `${worker.worker}: ${worker.source}${adapters}, ${worker.checkpoint.slice(0, 12)} since ${since}${scores}`;
}

function showJobs(page, jobs) {
  page.noJobs.hidden = jobs.length > 0;
  page.jobs.replaceChildren(...jobs.map(row));
}

function row(job) {
  const line = document.createElement("tr");
  const id = document.createElement("code");
  id.textContent = job.job_id.slice(0, 8);
  id.title = job.job_id;
  const cells = [id, label(job.task), state(job), job.result?.text ?? job.error?.code ?? ""];
  line.append(...cells.map((content) => {
    const cell = document.createElement("td");
    cell.append(content);
    return cell;
  }));
  return line;
}

function state(job) {
  const words = { in_progress: job.cancelling ? "stopping" : "running", queued: job.position === undefined ? "queued" : `queued, ${job.position} before` };
  const mark = document.createElement("span");
  mark.className = `state-${job.status}`;
  mark.textContent = words[job.status] || job.status;
  mark.title = (job.warnings || []).join("; ");
  return mark;
}
