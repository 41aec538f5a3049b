"use strict";
// Tokens that stay in this browser, and the keys of the tab Rate.
const milonga = {
  kept: (name) => { try { return localStorage.getItem("milonga-" + name) || ""; } catch { return ""; } },
  keep: (name, value) => {
    try { value ? localStorage.setItem("milonga-" + name, value) : localStorage.removeItem("milonga-" + name); }
    catch { /* a browser that keeps nothing */ }
  },
};
document.addEventListener("keydown", (event) => {
  const target = event.target;
  const typing = target.matches?.("textarea, select, input:not([type=checkbox]):not([type=radio])");
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const on = (id) => { const found = document.getElementById(id); return found?.offsetParent ? found : null; };
  if ("1234".includes(event.key)) on("rate-" + event.key)?.click();
  const side = { q: "left", w: "right" }[event.key];
  if (!side) return;
  const other = on(side === "left" ? "rate-right" : "rate-left");
  other?.pause();
  const audio = on("rate-" + side);
  if (audio) audio.paused ? audio.play() : audio.pause();
});
// One clip at a time.
document.addEventListener("play", (event) => {
  for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause();
}, true);
