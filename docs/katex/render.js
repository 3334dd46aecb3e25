// Sets what arithmatex marked as formulas; KaTeX lies beside this file, so no network is needed.
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".arithmatex")) {
    const text = place.textContent.replace(/^\\[[(]/, "").replace(/\\[\])]$/, "");
    katex.render(text, place, { displayMode: place.tagName === "DIV", throwOnError: false, output: "htmlAndMathml" });
    if (place.tagName === "DIV") place.tabIndex = 0;
  }
});
