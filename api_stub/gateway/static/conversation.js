// What was asked and answered, and the job that asks the next question. Knows no page and no network.
//
// A turn: {task, model, media: [{uri, kind: "image"|"video", thumb}], text, numFrames, sampling, jobId, state, answer, facts}.

const DEFAULT_PROMPT = "Describe this image.";
const STORED = "visionq.conversation";

/** Return the job for the last of `turns`, as `POST /v1/jobs` takes it. The turns before it are its history. */
export function jobOf(turns) {
  const turn = turns.at(-1);
  const history = turns.slice(0, -1).filter((past) => past.state === "completed");
  const hasClip = [...history, turn].some((one) => one.media.some((medium) => medium.kind === "video"));
  const rest = { model: turn.model, sampling: turn.sampling };
  if (history.length === 0) {
    return { task: turn.task, media: turn.media.map((medium) => medium.uri), ...textField(turn), ...framesField(turn.task, turn), ...rest };
  }
  const task = hasClip ? "visionq.video_qa" : "visionq.vqa";
  return { task, messages: history.flatMap(exchange).concat(userMessage(turn)), ...framesField(task, turn), ...rest };
}

function textField(turn) {
  if (turn.task !== "visionq.caption") return { question: turn.text };
  return turn.text ? { prompt: turn.text } : {};
}

function framesField(task, turn) {
  return task === "visionq.video_qa" ? { num_frames: turn.numFrames } : {};
}

function exchange(turn) {
  return [userMessage(turn), { role: "assistant", content: [{ type: "text", text: turn.answer }] }];
}

function userMessage(turn) {
  const media = turn.media.map(({ kind, uri }) => ({ type: kind, uri }));
  return { role: "user", content: [...media, { type: "text", text: turn.text || DEFAULT_PROMPT }] };
}

/** Keep the conversation over a reload of the page, in this tab only. */
export function save(turns) {
  try {
    sessionStorage.setItem(STORED, JSON.stringify(turns));
  } catch {
    // The tab's storage is full: the conversation then lasts as long as the page.
  }
}

export function load() {
  try {
    return JSON.parse(sessionStorage.getItem(STORED)) || [];
  } catch {
    return [];
  }
}
