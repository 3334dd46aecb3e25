// What the theme leaves out for those who read with a keyboard or a screen reader: boxes that scroll can be reached, the search has a name.
window.addEventListener("load", () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code, .highlight code")) box.tabIndex = 0;
});
