// How the search ranks pages: sphinx's own scores, with pages that teach before pages that list.
var Scorer = {
  score: ([docname, title, anchor, descr, score]) => {
    if (docname === "quick_start" || docname.startsWith("tutorials/")) return score + 4;
    if (/^(changelog|results|numerics)$/.test(docname) || (docname.startsWith("api/") && !anchor)) return score - 8;
    return score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
