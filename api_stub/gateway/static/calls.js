// The same call in other languages, ready to be copied.

export const LANGUAGES = { json: asJson, curl: asCurl, python: asPython };

function asJson(job) {
  return JSON.stringify(job, null, 2);
}

function asCurl(job, origin, hasKey) {
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $VISIONQ_API_KEY"` : "";
  const body = asJson(job).replaceAll("'", `'\\''`);
  return `curl -s ${origin}/v1/jobs${key} \\\n  -H 'Content-Type: application/json' \\\n  -d '${body}'\n\n# its events, with the id that came back\ncurl -N ${origin}/v1/jobs/$ID/events${key}`;
}

function asPython(job, origin, hasKey) {
  const key = hasKey ? `, api_key=os.environ["VISIONQ_API_KEY"]` : "";
  const head = hasKey ? "import os\n\n" : "";
  return `${head}from api_stub import Client\n\nclient = Client("${origin}"${key})\njob = client.submit(${literal(job)})\nfor piece in job.stream():\n    print(piece, end="", flush=True)`;
}

/** JSON as a Python literal. */
function literal(value, indent = "") {
  const deeper = indent + "    ";
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return block("[", value.map((item) => literal(item, deeper)), "]", indent);
  if (typeof value === "object") return block("{", Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, deeper)}`), "}", indent);
  // A JSON string is a Python string but for pairs of escaped surrogates, which JSON.stringify leaves as characters.
  return JSON.stringify(value);
}

function block(open, items, close, indent) {
  const line = open + items.join(", ") + close;
  return line.length + indent.length <= 88 && !line.includes("\n") ? line : `${open}\n${items.map((item) => `${indent}    ${item},\n`).join("")}${indent}${close}`;
}
