// Runs model.onnx on the examples that lie beside it, compares the outputs with those of ONNX Runtime where the page
// was made, and times one row. `about` is tersor-export.json; it says where each array lies in examples.bin.

const WARM_UPS = 3;
const MILLISECONDS = 2000; // of timing
const SAMPLE = 5; // milliseconds at least that one sample takes, for the browser's clock is coarse

const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  float16: Uint16Array,
  int64: BigInt64Array,
  int32: Int32Array,
  int8: Int8Array,
  uint8: Uint8Array,
  bool: Uint8Array,
};

async function main() {
  say("Loading ...");
  const about = await (await fetched("tersor-export.json")).json();
  show("weights", about.formats);
  show("notes", about.notes.join("; "));
  const ort = await runtime(about);
  const examples = await (await fetched("examples.bin")).arrayBuffer();
  const bytes = new Uint8Array(await (await fetched(about.model.file)).arrayBuffer());
  show("file", `${about.model.file}, ${(bytes.length / 1e6).toFixed(1)} MB`);

  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  show("runtime", `onnxruntime-web ${ort.env.versions.web}, WebAssembly, ${threads(ort)}`);

  say("Running ...");
  const feeds = {};
  for (const input of about.inputs) {
    feeds[input.name] = new ort.Tensor(input.type, stored(examples, input), input.dims);
  }
  const outputs = await session.run(feeds);
  const difference = Math.max(...about.outputs.map((each) => differs(outputs[each.name], each, examples)));
  show("examples", about.inputs.map((input) => `${input.name} ${input.dims.join("x")}`).join(", "));
  show("difference", `${(100 * difference).toFixed(4)} % from ${about.expected_from} on the same inputs`);

  const row = {};
  for (const input of about.inputs) {
    row[input.name] = input.any_number_of_rows ? firstRow(ort, feeds[input.name]) : feeds[input.name];
  }
  const latency = await medianLatency(() => session.run(row));
  const dims = row[about.inputs[0].name].dims.join("x");
  show("latency", `${latency.toFixed(3)} ms for one input of ${dims} (median of about ${MILLISECONDS / 1000} s)`);

  globalThis.result = { difference, latency, outputs };
  say("Done.");
  document.body.dataset.state = "done";
}

// onnxruntime-web, from the folder ort/ beside the page.
async function runtime(about) {
  const folder = new URL("ort/", import.meta.url);
  const entry = new URL(about.runtime.files[0], folder);
  if (!(await fetch(entry, { method: "HEAD" })).ok) {
    throw new Error(`onnxruntime-web is not in ort/. In this page's folder run:\n\n${about.runtime.install}`);
  }
  const ort = await import(entry.href);
  ort.env.wasm.wasmPaths = folder.href;
  if (!crossOriginIsolated) ort.env.wasm.numThreads = 1; // else as many as it chooses
  return ort;
}

function threads(ort) {
  const number = ort.env.wasm.numThreads;
  return number === 1 ? "1 thread" : `${number} threads`;
}

// An array of examples.bin.
function stored(examples, { type, offset, bytes }) {
  return new ARRAYS[type](examples.slice(offset, offset + bytes));
}

// |made - expected| / |expected| over the values that were kept: every `stride`-th.
function differs(made, about, examples) {
  if (String(made?.dims) !== String(about.dims)) return Infinity;
  const expected = stored(examples, about);
  const values = numbers(made);
  let error = 0;
  let length = 0;
  for (let i = 0; i < expected.length; i++) {
    error += (Number(values[i * about.stride]) - expected[i]) ** 2;
    length += expected[i] ** 2;
  }
  const found = Math.sqrt(error) / (Math.sqrt(length) || 1);
  return Number.isFinite(found) ? found : Infinity;
}

function numbers(tensor) {
  if (tensor.type === "float16" && tensor.data instanceof Uint16Array) {
    throw new Error("this browser has no Float16Array: take a newer one, or export without --dtype fp16");
  }
  return tensor.data;
}

function firstRow(ort, tensor) {
  const dims = [1, ...tensor.dims.slice(1)];
  return new ort.Tensor(tensor.type, tensor.data.slice(0, tensor.data.length / tensor.dims[0]), dims);
}

// Milliseconds per call.
async function medianLatency(call) {
  for (let i = 0; i < WARM_UPS; i++) await call();
  const samples = [];
  const end = performance.now() + MILLISECONDS;
  while (performance.now() < end || samples.length < 3) {
    const started = performance.now();
    let numCalls = 0;
    let elapsed = 0;
    while (elapsed < SAMPLE) {
      await call();
      numCalls += 1;
      elapsed = performance.now() - started;
    }
    samples.push(elapsed / numCalls);
  }
  return samples.sort((a, b) => a - b)[Math.floor(samples.length / 2)];
}

async function fetched(file) {
  const response = await fetch(new URL(file, import.meta.url));
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  return response;
}

function say(text) {
  document.querySelector("#status").textContent = text;
}

function show(name, value) {
  const row = document.querySelector("#facts").insertRow();
  row.insertCell().textContent = name;
  row.insertCell().textContent = value;
}

main().catch((error) => {
  say(error.message ?? String(error));
  document.body.dataset.state = "failed";
});
