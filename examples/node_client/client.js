/* Private inference from Node: the wire contract (docs/protocol.md) in one file.

     npm install
     node client.js cluster.toml client-bob.key client-bob.pem MODEL input.json [input.json ...]

   An input file holds nested arrays of numbers. Prints each output of the model as a line of JSON. Needs the .proto
   files: those of this checkout, or a copy in the directory that PROTOS names. */
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");
const tls = require("node:tls");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");
const toml = require("smol-toml");

const PROTOS = process.env.PROTOS || path.join(__dirname, "..", "..", "protos");
const { PartyService } = grpc.loadPackageDefinition(
  protoLoader.loadSync("mpcinfer/v1/party.proto", { keepCase: true, longs: Number, defaults: true, includeDirs: [PROTOS] })
).mpcinfer.v1;

/** A stub for a party that must prove to hold the key that the cluster file pins. */
function connect(endpoint, index, ca, key, certificate) {
  const name = `party-${index}.mpcinfer`; // the DNS name in its certificate, wherever it runs
  const checkServerIdentity = (host, shown) => {
    const wrongName = tls.checkServerIdentity(host, shown);
    if (wrongName) return wrongName;
    const spki = new crypto.X509Certificate(shown.raw).publicKey.export({ type: "spki", format: "der" });
    const pin = "sha256:" + crypto.createHash("sha256").update(spki).digest("hex");
    if (pin !== endpoint.key) {
      return new Error(`party/${index} at ${endpoint.address} does not hold the key that the cluster file pins`);
    }
  };
  const credentials = grpc.credentials.createSsl(ca, key, certificate, { checkServerIdentity });
  return new PartyService(endpoint.address, credentials, {
    "grpc.ssl_target_name_override": name,
    "grpc.max_receive_message_length": 256 * 2 ** 20,
  });
}

/** Makes one call at all parties at once. */
function callAll(stubs, method, requests, seconds) {
  const one = (stub, request) =>
    new Promise((resolve, reject) => {
      const deadline = new Date(Date.now() + 1000 * seconds);
      stub[method](request, { deadline }, (error, answer) => {
        if (!error) return resolve(answer);
        const kind = (error.metadata && error.metadata.get("mpcinfer-error")[0]) || grpc.status[error.code];
        reject(new Error(`${kind}: ${error.details}`));
      });
    });
  return Promise.all(stubs.map((stub, i) => one(stub, requests[i])));
}

const shapeOf = (x) => (Array.isArray(x) ? [x.length, ...shapeOf(x[0] ?? 0)] : []);
const count = (shape) => shape.reduce((a, b) => a * b, 1);

/** Fixed point: the integers nearest to x * 2^f, halves to even, as residues mod 2^64. */
function encode(x, spec) {
  const limit = Math.min(2 ** (62 - 2 * spec.frac_bits), spec.limit || Infinity);
  return BigUint64Array.from(x, (value) => {
    if (typeof value !== "number" || !(Math.abs(value) < limit)) {
      throw new Error(`input ${spec.name} has an entry that is no number of absolute value below ${limit}`);
    }
    const scaled = value * 2 ** spec.frac_bits;
    const up = Math.round(scaled); // halves go up
    const even = up - scaled === 0.5 && up % 2 !== 0 ? up - 1 : up;
    return BigInt.asUintN(64, BigInt(even));
  });
}

/** The share that a seed stands for: AES-128-CTR, 8 bytes per element, little-endian. */
function keyStream(seed, elements) {
  const cipher = crypto.createCipheriv("aes-128-ctr", seed.subarray(0, 16), seed.subarray(16));
  return words(cipher.update(Buffer.alloc(8 * elements)));
}

function words(data) {
  return BigUint64Array.from({ length: data.length / 8 }, (_, i) => data.readBigUInt64LE(8 * i));
}

/** One Tensor per party: fresh seeds for all but the last, for the last what makes the sum right. */
function split(x, shape, spec, parties) {
  const form = { shape, frac_bits: spec.frac_bits, ring_bits: 64 };
  const last = x.slice();
  const tensors = [];
  for (let i = 0; i < parties - 1; i++) {
    const seed = crypto.randomBytes(32);
    const stream = keyStream(seed, last.length);
    for (let j = 0; j < last.length; j++) last[j] -= stream[j]; // a BigUint64Array wraps mod 2^64
    tensors.push({ ...form, seed });
  }
  const data = Buffer.alloc(8 * last.length);
  last.forEach((value, i) => data.writeBigUInt64LE(value, 8 * i));
  return [...tensors, { ...form, data }];
}

/** The output: the sum of the shares, signed, and back from fixed point (integers where f = 0). */
function combine(tensors, spec) {
  const shape = tensors[0].shape;
  const total = new BigUint64Array(count(shape));
  for (const tensor of tensors) {
    const share = tensor.seed?.length ? keyStream(tensor.seed, total.length) : words(tensor.data);
    share.forEach((value, i) => (total[i] += value));
  }
  const flat = Array.from(total, (value) => Number(BigInt.asIntN(64, value)) / 2 ** spec.frac_bits);
  const nest = (values, [size, ...rest]) =>
    size === undefined
      ? values[0]
      : Array.from({ length: size }, (_, i) => nest(values.slice(i * count(rest), (i + 1) * count(rest)), rest));
  return nest(flat, shape);
}

async function main([clusterFile, keyFile, certificateFile, name, ...files]) {
  if (!files.length) throw new Error("usage: client.js CLUSTER KEY CERTIFICATE MODEL INPUT.json [INPUT.json ...]");
  const cluster = toml.parse(fs.readFileSync(clusterFile, "utf8"));
  const ca = fs.readFileSync(path.resolve(path.dirname(clusterFile), cluster.ca));
  const key = fs.readFileSync(keyFile);
  const certificate = fs.readFileSync(certificateFile);
  const stubs = cluster.party.map((endpoint, i) => connect(endpoint, i, ca, key, certificate));

  const lists = await callAll(stubs, "ListModels", stubs.map(() => ({})), 10);
  const newest = lists.map((a) =>
    a.models.filter((m) => m.name === name).reduce((a, b) => (a && a.version > b.version ? a : b), null)
  );
  if (newest.some((m) => !m || !m.deployment_id.equals(newest[0].deployment_id))) {
    throw new Error(`the parties do not all hold the same model "${name}"`);
  }
  const model = newest[0];
  if (files.length !== model.inputs.length) throw new Error(`model "${name}" takes ${model.inputs.length} inputs`);

  const request = { request_id: crypto.randomBytes(16), model: name, version: model.version };
  const requests = stubs.map(() => ({ ...request, inputs: [] }));
  files.forEach((file, i) => {
    const x = JSON.parse(fs.readFileSync(file, "utf8"));
    const [shape, spec] = [shapeOf(x), model.inputs[i]];
    const flat = x.flat(Infinity);
    if (shape.length !== spec.shape.length || flat.length !== count(shape)) throw new Error(`${file}: wrong shape`);
    split(encode(flat, spec), shape, spec, stubs.length).forEach((tensor, j) => requests[j].inputs.push(tensor));
  });
  const answers = await callAll(stubs, "Infer", requests, 60);
  model.outputs.forEach((spec, i) => console.log(JSON.stringify(combine(answers.map((a) => a.outputs[i]), spec))));
  stubs.forEach((stub) => stub.close());
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
