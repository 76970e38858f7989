/* Says on the console what of a report is clipped, outside its card or on top of another label. */
addEventListener("load", () => {
  const say = (what, element) =>
    console.log(`${what}: ${element.tagName} ${element.textContent.slice(0, 60)}`);
  const page = document.documentElement;
  if (page.scrollWidth > innerWidth) say("wider than the window", page.querySelector("h1"));
  if (logScale) for (const button of document.querySelectorAll(".chart button")) button.click();
  for (const box of document.querySelectorAll(".card, .panel")) {
    const card = box.getBoundingClientRect();
    for (const element of box.querySelectorAll("*")) {
      if (element.closest("[hidden], [visibility=hidden]")) continue;
      const own = element.getBoundingClientRect();
      if (!own.width && !own.height) continue;
      const beside = own.left < card.left - 1 || own.right > card.right + 1;
      const beyond = own.top < card.top - 1 || own.bottom > card.bottom + 1;
      if (beside || (beyond && !box.matches(".scroll"))) say("outside its card", element);
      const cut = !(element instanceof SVGElement) && element.tagName !== "I" &&
        getComputedStyle(element).overflow !== "visible";
      if (cut && element.scrollWidth > element.clientWidth + 1) say("clipped", element);
    }
  }
  for (const svg of document.querySelectorAll(".chart svg")) {
    const texts = [...svg.querySelectorAll(":scope > text")];
    const places = texts.map(text => text.getBoundingClientRect());
    const levels = texts.filter(text => text.getAttribute("text-anchor") === "end");
    if (levels.length < 2) say("an axis without two numbers", svg);
    texts.forEach((text, i) => {
      if (/NaN|Infinity|undefined/.test(text.textContent)) say("no number", text);
      for (const other of places.slice(i + 1)) {
        const across = places[i].left < other.right && other.left < places[i].right;
        const along = places[i].top + 3 < other.bottom && other.top + 3 < places[i].bottom;
        if (across && along) say("two labels in one place", text);
      }
    });
  }
  console.log("measured");
});
