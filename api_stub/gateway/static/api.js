// The gateway's HTTP API, as far as this page uses it. Paths are relative: the page may live below a prefix.

export class ApiError extends Error {
  /** `problem`: the body of an application/problem+json answer. */
  constructor(status, problem) {
    super(problem.detail || problem.title || `the gateway answered ${status}`);
    this.status = status;
    this.code = problem.code || "";
  }
}

export class Api {
  constructor(key = "") {
    this.key = key;
  }

  async submit(job) {
    return this.#json("v1/jobs", { method: "POST", body: JSON.stringify(job), headers: { "Content-Type": "application/json" } });
  }

  /** Store a file and return its s3:// address. */
  async upload(blob, name) {
    const form = new FormData();
    form.append("file", blob, name);
    return (await this.#json("v1/uploads/inline", { method: "POST", body: form })).uri;
  }

  async cancel(id) {
    return this.#json(`v1/jobs/${encodeURIComponent(id)}/cancel`, { method: "POST" });
  }

  async show(id) {
    return this.#json(`v1/jobs/${encodeURIComponent(id)}`);
  }

  async jobs(limit = 15) {
    return (await this.#json(`v1/jobs?limit=${limit}`)).jobs;
  }

  async queues() {
    return (await this.#json("v1/queues")).queues;
  }

  /** Open a job's event stream after `lastId`. Returns null when nothing comes after it any more. */
  async stream(id, lastId, signal) {
    const headers = lastId ? { "Last-Event-ID": String(lastId) } : {};
    const response = await this.#fetch(`v1/jobs/${encodeURIComponent(id)}/events`, { headers, signal });
    return response.status === 204 ? null : response.body;
  }

  async #json(path, init) {
    return (await this.#fetch(path, init)).json();
  }

  async #fetch(path, init = {}) {
    const headers = new Headers(init.headers);
    if (this.key) headers.set("Authorization", `Bearer ${this.key}`);
    const response = await fetch(path, { ...init, headers, cache: "no-store" });
    if (response.ok) return response;
    let problem = {};
    try {
      problem = await response.json();
    } catch {
      // A proxy between us and the gateway answers in its own words.
    }
    throw new ApiError(response.status, problem);
  }
}
