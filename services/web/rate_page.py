"""The page on which people rate pairs: one file, which asks no other machine for anything."""

from typing import Final

RATE_PAGE: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Milonga: rate pairs</title>
<style>
:root { color-scheme: light dark; font: 18px/1.5 system-ui, sans-serif; }
body { max-width: 44rem; margin: 1rem auto; padding: 0 1rem; }
h1 { font-size: 1.2rem; } #prompt { font-size: 1.4rem; font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
fieldset { border: 1px solid #8888; border-radius: .5rem; } audio { width: 100%; }
.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .5rem;
  margin: 1rem 0; }
button, input { font: inherit; padding: .6rem; border-radius: .5rem; border: 1px solid #888; }
button:focus-visible { outline: 3px solid #4a90d9; } #problem { color: #c33; font-weight: 600; }
</style>
<h1>Which clip is the better answer?</h1>
<p id="problem" role="alert"></p>
<form id="enter" hidden><label>Your token
<input id="token" type="password" autocomplete="off" required></label>
<button>Begin</button></form>
<main id="main" hidden>
<p id="prompt"></p>
<div class="pair">
<fieldset><legend>Left</legend><audio id="left" controls></audio>
<label><input type="checkbox" id="left_present"> every event is there</label><br>
<label><input type="checkbox" id="left_in_order"> in order</label></fieldset>
<fieldset><legend>Right</legend><audio id="right" controls></audio>
<label><input type="checkbox" id="right_present"> every event is there</label><br>
<label><input type="checkbox" id="right_in_order"> in order</label></fieldset>
</div>
<p><label><input type="checkbox" id="absolute"> My answers on the single clips count</label></p>
<div class="verdicts">
<button data-verdict="left">1 Left</button><button data-verdict="right">2 Right</button>
<button data-verdict="both_good">3 Both good</button><button data-verdict="both_bad">4 Both bad</button>
</div>
<p><button id="back">Take the last one back</button> <span id="count"></span></p>
<p>Keys: 1 to 4 rate, q plays left, w plays right.</p>
</main>
<p id="end" hidden>All pairs are rated. Thank you.</p>
<script>
const get = id => document.getElementById(id);
const boxes = ["left_present", "left_in_order", "right_present", "right_in_order"];
let token = localStorage.getItem("milonga-rater"), pair = null, last = null, busy = false;
async function call(method, path, body) {
  busy = true;
  try {
    const answer = await fetch(path, {method, headers: {Authorization: "Bearer " + token,
      "Content-Type": "application/json"}, body: body && JSON.stringify(body)});
    const found = await answer.json();
    if (answer.status === 401) { localStorage.removeItem("milonga-rater"); get("enter").hidden = false; }
    if (!answer.ok) throw new Error(found.detail);
    get("problem").textContent = "";
    show(found);
    return true;
  } catch (error) {
    get("problem").textContent = "Not saved: " + error.message;
    return false;
  } finally { busy = false; }
}
function show(state) {
  pair = state.pair;
  get("enter").hidden = true; get("main").hidden = !pair; get("end").hidden = !!pair;
  get("count").textContent = state.done + " of " + state.total + " rated by " + state.rater;
  get("back").disabled = last === null;
  if (!pair) return;
  get("prompt").textContent = pair.prompt;
  get("left").src = pair.left; get("right").src = pair.right;
  for (const box of [...boxes, "absolute"]) get(box).checked = false;
}
async function rate(verdict) {
  if (!pair || busy) return;
  const body = {item: pair.item, verdict}, item = pair.item;
  if (get("absolute").checked) for (const box of boxes) body[box] = get(box).checked;
  if (await call("POST", "/v1/ratings", body)) { last = item; get("back").disabled = false; }
}
for (const button of document.querySelectorAll("[data-verdict]"))
  button.onclick = () => rate(button.dataset.verdict);
get("back").onclick = async () => {
  if (last === null || busy) return;
  const item = last; last = null;
  if (!await call("DELETE", "/v1/ratings/" + item)) last = item;
};
get("enter").onsubmit = event => {
  event.preventDefault(); token = get("token").value.trim();
  localStorage.setItem("milonga-rater", token); call("GET", "/v1/ratings/next");
};
document.onkeydown = event => {
  if (event.target.type === "password" || event.ctrlKey || event.metaKey || event.altKey) return;
  const verdict = {1: "left", 2: "right", 3: "both_good", 4: "both_bad"}[event.key];
  if (verdict) rate(verdict);
  if (event.key === "q") get("left").play();
  if (event.key === "w") get("right").play();
};
if (token) call("GET", "/v1/ratings/next"); else get("enter").hidden = false;
</script></html>
"""
