// Node.js: `node_counter.js DIR`. Lines appended to a file, a timer, a promise and a chain in memory.
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");

const LINE = 12 + 1 + 16 + 1;
const directory = path.resolve(process.argv[2]);
const progress = fs.openSync(path.join(directory, "progress"), "w+");
const logPath = path.join(directory, "log");
const log = fs.openSync(logPath, "a");
const first = crypto.randomBytes(8).toString("hex");
let failure = null;
let asked = false;

function link(previous, number) {
  return crypto.createHash("sha1").update(`${previous} ${number}`).digest("hex").slice(0, 16);
}

function line(number, chain) {
  return `${String(number).padStart(12, "0")} ${chain}\n`;
}

function say(name, text) {
  const fresh = path.join(directory, `.${name}.new`);
  fs.writeFileSync(fresh, text + "\n");
  fs.renameSync(fresh, path.join(directory, name));
}

function expect(holds, sentence) {
  if (!holds) throw new Error(sentence);
}

function show(count) {
  fs.writeSync(progress, String(count).padStart(20, "0") + "\n", 0);
}

// What is in the file behind what memory knows must be what would come next; it is cut off. Behind
// that our last line may be once more: the image was made just before it was written.
function cutBack(count, chain) {
  const known = count * LINE;
  const surplus = fs.fstatSync(log).size - known;
  expect(surplus >= 0, `the log has lost its last ${-surplus} bytes`);
  if (surplus === 0) return;
  let found = fs.readFileSync(logPath, "latin1").slice(known);
  const last = line(count - 1, chain);
  while (count > 0 && found.endsWith(last)) found = found.slice(0, -LINE);
  let coming = "";
  for (let number = count; coming.length < found.length; number++) {
    chain = link(chain, number);
    coming += line(number, chain);
  }
  expect(coming.startsWith(found), `the log goes on wrongly after line ${count}`);
  fs.ftruncateSync(log, known);
}

function check(count, chain) {
  const text = fs.readFileSync(logPath, "latin1");
  let expected = first;
  for (let number = 0; number < count; number++) {
    expected = link(expected, number);
    const found = text.slice(number * LINE, (number + 1) * LINE);
    expect(found === line(number, expected), `line ${number} of the log is ${found.trim()}`);
  }
  expect(expected === chain, "the chain in memory is broken");
}

async function work() {
  fs.ftruncateSync(log, 0);
  show(0);
  process.on("SIGTERM", () => (asked = true));
  say("ready", `${process.pid}\ncounts in Node.js`);
  let count = 0;
  let chain = first;
  while (!asked) {
    cutBack(count, chain);
    chain = link(chain, count);
    fs.writeSync(log, line(count, chain));
    show(++count);
    await new Promise((resume) => setTimeout(resume, 5));
  }
  cutBack(count, chain);
  check(count, chain);
}

work()
  .catch((error) => (failure = error.message))
  .then(() => {
    say("verdict", failure === null ? "PASS" : `FAIL: ${failure}`);
    process.exit(failure === null ? 0 : 1);
  });
