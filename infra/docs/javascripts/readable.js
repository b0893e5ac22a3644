/* Wide tables, which the theme wraps once it has run, can be scrolled with the keyboard (WCAG 2.1.1; tests/docs/test_site.py). */
const reach = () => document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code").forEach((e) => (e.tabIndex = 0));
new MutationObserver(reach).observe(document.body, { childList: true, subtree: true });
reach();
