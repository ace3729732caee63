// The playground: puts the parts together. Everything it does goes through the public API.

import { Api } from "./api.js";
import { LANGUAGES } from "./calls.js";
import { jobOf, load, save } from "./conversation.js";
import { drawClip, drawImage } from "./drawings.js";
import { follow } from "./events.js";
import { Speed, watch } from "./live.js";
import { Tray } from "./tray.js";
import { take, turnElement } from "./turns.js";

const KEY = "visionq.key";
const byId = (id) => document.getElementById(id);
const page = {
  form: byId("ask"), turns: byId("turns"), status: byId("status"), text: byId("text"), problem: byId("problem"),
  send: byId("send"), stop: byId("stop"), call: byId("call"), model: byId("model"), jobs: byId("jobs"), noJobs: byId("no-jobs"),
  live: (name) => document.querySelector(`[data-live="${name}"]`),
};

let api = new Api(sessionStorage.getItem(KEY) || "");
let turns = load();
let following = null; // AbortController of the turn that is being answered
let language = "json";
const speed = new Speed();
const tray = new Tray(byId("media"), suggestTask);

// ---- asking ----

page.form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (page.send.disabled) return;
  if (!page.text.value.trim() && task() !== "visionq.caption") return complain("Write a question first.");
  if (!tray.media.length && task() !== "visionq.vqa" && !turns.length) return complain("Add an image or a clip first.");
  complain("");
  setBusy(true);
  say("sending");
  try {
    const turn = { ...draft(), media: await tray.stored(api), state: "asked", answer: "", facts: "" };
    const job = await api.submit(jobOf([...turns, turn]));
    turn.jobId = job.job_id;
    turn.facts = (job.warnings || []).join("; ");
    turns.push(turn);
    save(turns);
    tray.clear();
    page.text.value = "";
    showCall(jobOf(turns));
    await answer(turn, append(turn));
  } catch (error) {
    complain(error.message);
    if (error.status === 401) askForKey();
    say("");
  } finally {
    setBusy(false);
  }
});

page.text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    page.form.requestSubmit();
  }
});

page.stop.addEventListener("click", async () => {
  page.stop.disabled = true;
  try {
    await api.cancel(turns.at(-1).jobId);
  } catch (error) {
    complain(error.message);
  }
  page.stop.disabled = false;
});

/** Follow a turn's job to its end. */
async function answer(turn, element) {
  following = new AbortController();
  page.stop.hidden = false;
  try {
    for await (const event of follow(api, turn.jobId, following.signal, () => say("connection lost, coming back"))) {
      if (event.type === "output.delta") speed.add(event.num_tokens);
      const stage = take(turn, event);
      element.show();
      if (stage) say(stage);
    }
    announce(turn.state === "completed" ? `Answer: ${turn.answer}` : turn.facts);
  } catch (error) {
    Object.assign(turn, { state: "failed", facts: error.message });
    element.show();
  } finally {
    page.stop.hidden = true;
    following = null;
    save(turns);
  }
}

function draft() {
  const options = { temperature: Number(byId("temperature").value) };
  if (byId("max-new-tokens").value) options.max_new_tokens = Number(byId("max-new-tokens").value);
  const text = page.text.value.trim();
  return { task: task(), model: page.model.value || "default", text, numFrames: Number(byId("num-frames").value), sampling: options };
}

function append(turn) {
  const element = turnElement(turn);
  page.turns.append(element);
  element.scrollIntoView({ block: "nearest" });
  return element;
}

function setBusy(isBusy) {
  page.send.disabled = isBusy;
  page.form.setAttribute("aria-busy", String(isBusy));
}

function say(sentence) {
  page.status.textContent = sentence;
}

/** For screen readers: the whole answer once, and not every token. */
function announce(sentence) {
  byId("announcement").textContent = sentence;
}

function complain(sentence) {
  page.problem.textContent = sentence;
  page.problem.hidden = !sentence;
  if (sentence) page.text.focus();
}

// ---- task and media ----

function task() {
  return page.form.elements.task.value;
}

page.form.addEventListener("change", nameText);

function suggestTask(kinds) {
  if (kinds.has("video")) page.form.elements.task.value = "visionq.video_qa";
  else if (kinds.has("image") && task() === "visionq.video_qa") page.form.elements.task.value = "visionq.vqa";
  nameText();
}

function nameText() {
  byId("text-label").textContent = task() === "visionq.caption" ? "Prompt (may be empty)" : "Question";
}

byId("files").addEventListener("change", async (event) => {
  await tray.addFiles(event.target.files);
  event.target.value = "";
});

async function draw(make, kind) {
  const { question, ...medium } = await make();
  tray.add({ kind, ...medium });
  if (!page.text.value && task() !== "visionq.caption") page.text.value = question;
}

byId("sample-image").addEventListener("click", () => draw(drawImage, "image"));
byId("sample-clip").addEventListener("click", () => draw(drawClip, "video"));

const drop = byId("drop");
for (const kind of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") tray.addFiles(event.dataTransfer.files);
  });
}

// ---- the same call ----

let shown = null;

function showCall(job) {
  shown = job;
  const here = location.href.replace(/\/[^/]*$/, "");
  page.call.textContent = job ? LANGUAGES[language](job, here, Boolean(api.key)) : "Ask something; its call will stand here.";
}

const tabs = [...document.querySelectorAll('[role="tab"]')];
tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) choose(tabs[(index + step + tabs.length) % tabs.length]);
  });
});

function choose(tab) {
  for (const one of tabs) {
    one.setAttribute("aria-selected", String(one === tab));
    one.tabIndex = one === tab ? 0 : -1;
  }
  tab.focus();
  page.call.setAttribute("aria-labelledby", tab.id);
  language = tab.id.replace("tab-", "");
  showCall(shown);
}

byId("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(page.call.textContent);
  say("copied");
});

// ---- key, new conversation, start ----

const dialog = byId("key-dialog");
byId("key").addEventListener("click", askForKey);
dialog.addEventListener("close", () => {
  if (dialog.returnValue !== "save") return;
  const key = byId("key-input").value.trim();
  sessionStorage.setItem(KEY, key);
  api = new Api(key);
  complain("");
  showCall(shown);
});

function askForKey() {
  byId("key-input").value = api.key;
  if (!dialog.open) dialog.showModal();
}

byId("new").addEventListener("click", () => {
  following?.abort();
  turns = [];
  save(turns);
  page.turns.replaceChildren();
  showCall(null);
  say("");
  page.text.focus();
});

let hadTrouble = false;

watch(page, () => api, speed, (error) => {
  if (error && !hadTrouble) {
    say(error.status === 401 ? "This gateway wants an API key." : "The gateway does not answer.");
    if (error.status === 401) askForKey();
  } else if (!error && hadTrouble && !following) say("");
  hadTrouble = Boolean(error);
});

async function start() {
  const elements = turns.map(append);
  showCall(turns.length ? jobOf(turns) : null);
  nameText();
  const last = turns.at(-1);
  // A page that was reloaded in the middle of an answer reads it from its beginning.
  if (last?.state === "asked") {
    setBusy(true);
    await answer(last, elements.at(-1));
    setBusy(false);
  }
}

start();
