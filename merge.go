// This file turns results into a page that scrapers share.
//
// A labeller reads one body, adds the labels of its source to the samples, and sorts
// them by metric family into an exposition, which never changes again. merge puts any
// number of expositions on one page. It moves families and refers to their lines as
// ranges of bytes: its work grows with the number of families, not of samples.
//
// An exposition keeps the format of its body, text or OpenMetrics. For a page in the
// other one, only the families that read differently there are written anew.

package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"hash/maphash"
	"maps"
	"math"
	"os"
	"runtime"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// ---- Merging

// merged is what is to be on a page: metric families in the order of their names.
type merged struct {
	groups      []group
	openMetrics bool     // the page's format, which all groups are in
	names       []string // of the sources of the bodies
	findings
}

// findings are what could not be merged as it came.
type findings struct {
	conflicts  []finding // families served untyped, in order
	repeating  []finding // families of the samples left out, in order
	duplicates int       // samples left out because an earlier body has the series
}

// finding is a metric family that could not be merged as it came.
type finding struct {
	family  string
	sources []string // names of those concerned
}

// finding returns a finding about a group. If several bodies have a type for it, those
// concern it; otherwise all do.
func (m *merged) finding(g group) finding {
	var all, typed []int32
	for _, p := range g {
		all = append(all, p.rank)
		if p.metricType != untyped {
			typed = append(typed, p.rank)
		}
	}
	ranks := slices.Compact(typed)
	if len(ranks) < 2 {
		ranks = slices.Compact(all)
	}
	f := finding{family: string(g.name())}
	for _, rank := range ranks {
		f.sources = append(f.sources, m.names[rank])
	}
	f.sources = slices.Compact(f.sources)
	return f
}

// part is what one body has of a family: all its lines, or a run of them.
type part struct {
	body *exposition
	*family
	run  span
	rank int32 // of the body, in the order of the flags
}

// text returns a range of the part's body.
func (p *part) text(s span) []byte { return p.body.text(s) }

// compare says which of two parts comes first: by name, then by body, then as they came.
func (p *part) compare(other *part) int {
	if order := bytes.Compare(p.text(p.name), other.text(other.name)); order != 0 {
		return order
	}
	if p.body != other.body {
		return cmp.Compare(p.rank, other.rank)
	}
	return cmp.Compare(p.run.from, other.run.from)
}

// group is all parts of one family on the page, in order.
type group []*part

// merge merges bodies for a page of a format. Each body is one exposition, or several if
// some of its families had to be changed for that; names are those of their sources. It
// fails if ctx ends.
func merge(ctx context.Context, bodies [][]*exposition, names []string, openMetrics bool) (*merged, error) {
	var lists [][]*part
	for rank, body := range bodies {
		for _, e := range body {
			lists = append(lists, e.parts(int32(rank)))
		}
	}
	m := &merged{groups: groupsOf(mergeParts(lists)), openMetrics: openMetrics, names: names}
	for changed := true; changed; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		changed = m.settle(judge(m.groups, openMetrics))
		// On an OpenMetrics page one change may call for another. That ends, for each takes a
		// type away from a family or shortens a name.
		changed = changed && openMetrics
	}
	slices.SortFunc(m.conflicts, func(a, b finding) int { return cmp.Compare(a.family, b.family) })
	return m, m.dropRepeats(ctx)
}

// parts lists the families of an exposition.
func (e *exposition) parts(rank int32) []*part {
	parts := make([]part, len(e.families))
	list := make([]*part, len(parts))
	for i := range parts {
		f := &e.families[i]
		parts[i] = part{body: e, family: f, run: f.lines, rank: rank}
		list[i] = &parts[i]
	}
	return list
}

// mergeParts merges lists that are in order. Of parts that compare alike, those of an
// earlier list come first.
func mergeParts(lists [][]*part) []*part {
	switch len(lists) {
	case 0:
		return nil
	case 1:
		return lists[0]
	}
	a, b := mergeParts(lists[:len(lists)/2]), mergeParts(lists[len(lists)/2:])
	all := make([]*part, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if a[0].compare(b[0]) <= 0 {
			all, a = append(all, a[0]), a[1:]
		} else {
			all, b = append(all, b[0]), b[1:]
		}
	}
	return append(append(all, a...), b...)
}

// groupsOf groups parts that are in order by family.
func groupsOf(parts []*part) []group {
	groups := make([]group, 0, len(parts))
	for len(parts) > 0 {
		n := 1
		for n < len(parts) && bytes.Equal(group(parts[n:]).name(), group(parts).name()) {
			n++
		}
		groups, parts = append(groups, parts[:n:n]), parts[n:]
	}
	return groups
}

// name returns the name of the family.
func (g group) name() []byte { return g[0].text(g[0].name) }

// types returns the types that the parts have.
func (g group) types() typeSet {
	var types typeSet
	for _, p := range g {
		types |= 1 << p.metricType
	}
	return types
}

// contradicts reports whether a sample of the group speaks against the type.
func (g group) contradicts(t metricType) bool {
	return slices.ContainsFunc(g, func(p *part) bool {
		return t == histogram && p.noHistogram || t == summary && p.noSummary
	})
}

// fits reports whether OpenMetrics has such samples for a type. What came as OpenMetrics is
// not looked at, but for the names.
func (g group) fits(t metricType) bool {
	named := t == counter || t == histogram || t == gaugeHistogram || t == info // its samples, not by its name
	for _, p := range g {
		switch other := p.metricType != t; {
		case named && p.bare, other && (p.metricType != untyped || t == info || t == stateset):
			return false
		case (p.body.loose || other) && !p.isStrict(t):
			return false
		}
	}
	return true
}

// isStrict reports whether the strictest parsers of OpenMetrics take the lines of the part
// as those of a family of that type.
func (p *part) isStrict(t metricType) bool {
	if t != counter && t != histogram && t != summary {
		return true
	}
	r := strictReader{boundName: map[metricType]string{histogram: "le", summary: "quantile"}[t]}
	lines := parserOf(p.text(p.run), p.body.openMetrics)
	for lines.next() {
		if !r.take(&lines, string(lines.name[p.name.to-p.name.from:])) {
			return false
		}
	}
	return t == counter || r.endGroup()
}

// strictReader reads the samples of a counter, histogram or summary as strict parsers do.
type strictReader struct {
	boundName string // of the label; a counter has none

	// Samples with the same labels, but for bounds, are a group, and stand together.
	labels, before []byte // of the last sample and the one before
	stamp          []byte
	bound, value   float64 // of the last bucket or quantile; NaN before the first
	count          float64 // NaN if there is none
	sum, negative  bool    // there is a sum, or a bound below zero

	sums, quantiles bool // there are groups of nothing else
}

// take reads a sample whose name has that suffix, and reports whether strict parsers would.
func (r *strictReader) take(p *parser, suffix string) bool {
	value, _ := strconv.ParseFloat(string(p.valueText()), 64)
	isCount := suffix == "_bucket" || suffix == "_count"
	switch {
	case (suffix != "" || r.boundName == "") && !(value >= 0), isCount && math.Mod(value, 1) != 0:
		return false
	case r.boundName == "":
		return true
	}
	r.before, r.labels = r.labels, p.appendLabels(append(r.before[:0], '{'), r.boundName)
	if !bytes.Equal(r.labels, r.before) {
		if len(r.before) > 0 && !r.endGroup() {
			return false
		}
		r.stamp, r.sum, r.negative = p.stamp, false, false
		r.bound, r.value, r.count = math.NaN(), math.NaN(), math.NaN()
	}
	switch suffix {
	case "_sum":
		r.sum = true
	case "_count":
		r.count = value
	default:
		if !r.takeBound(p.labelNamed([]byte(r.boundName)), value) {
			return false
		}
	}
	return bytes.Equal(p.stamp, r.stamp)
}

// takeBound reads a bucket or a quantile.
func (r *strictReader) takeBound(text []byte, value float64) bool {
	bound, _ := strconv.ParseFloat(string(text), 64)
	rising := !(bound <= r.bound || value < r.value)
	r.bound, r.value, r.negative = bound, value, r.negative || bound < 0
	if r.boundName == "quantile" {
		return isNumber(text) && 0 <= bound && bound <= 1 && !(value < 0)
	}
	return isNumber(text) && rising && bound == bound && (bound <= math.MaxFloat64 || string(text) == "+Inf")
}

// endGroup reports whether the group is whole.
func (r *strictReader) endGroup() bool {
	counted := r.count == r.count
	if r.boundName == "le" {
		return math.IsInf(r.bound, 1) && r.sum == counted && (!counted || r.count == r.value) && !(r.sum && r.negative)
	}
	r.sums = r.sums || r.bound != r.bound
	r.quantiles = r.quantiles || !counted
	return r.sum == counted && !(r.sums && r.quantiles) // or the parts of a group might stand apart
}

// takeCounters takes out of a group whose types differ the counters of OpenMetrics, whose
// samples have other names.
func (g group) takeCounters() (counters, others group) {
	if g.types().agreed() != conflicting {
		return nil, g
	}
	for _, p := range g {
		if p.metricType == counter && !p.bare {
			counters = append(counters, p)
		} else {
			others = append(others, p)
		}
	}
	return counters, others
}

// unit returns the unit that those parts of the group agree on that give one.
func (g group) unit() uint32 {
	var unit uint32
	for _, p := range g {
		if unit > 0 && p.unit > 0 && p.unit != unit {
			return 0
		}
		unit = max(unit, p.unit)
	}
	return unit
}

// find returns where in groups the family of a name is, or would be.
func find(groups []group, name []byte) (i int, found bool) {
	return slices.BinarySearchFunc(groups, name, func(g group, name []byte) int {
		return bytes.Compare(g.name(), name)
	})
}

// verdict says whether a family can stay as it is.
type verdict uint8

const (
	stays   verdict = iota
	toFold          // into the family that claims the name
	toPart          // its counters, which have other sample names, become untyped families
	toYield         // becomes untyped families, one for each sample name
	toSplit         // likewise, and that is a conflict
)

// judge returns a verdict on each group. A family is split if its types differ, or if it
// claims the name of a family with another type, which is split, too. It yields if its type
// has no such samples, or reserves a name. A family without a type whose name is claimed is
// folded.
func judge(groups []group, openMetrics bool) []verdict {
	verdicts := make([]verdict, len(groups))
	var claims [][2]int // of a name by an earlier family
	for i, g := range groups {
		verdicts[i] = g.judge(openMetrics)
		c := claimer(groups, g.name(), openMetrics)
		if c < 0 {
			continue
		}
		claims = append(claims, [2]int{i, c})
		t, claiming := g.types().agreed(), groups[c].types().agreed()
		isSample := histogram.claims(string(g.name()[len(groups[c].name()):]), false) // not only reserved
		switch {
		case openMetrics && (t == unknown || t == untyped && claiming != counter),
			openMetrics && t != untyped && !isSample:
			verdicts[c] = max(verdicts[c], toYield)
		case t != untyped:
			verdicts[i], verdicts[c] = toSplit, toSplit
		case !openMetrics && g.contradicts(claiming):
			verdicts[c] = toSplit
		}
	}
	for _, c := range claims {
		if verdicts[c[1]] < toPart {
			verdicts[c[0]] = max(verdicts[c[0]], toFold)
		}
	}
	return verdicts
}

// judge returns the verdict on a group alone.
func (g group) judge(openMetrics bool) verdict {
	types := g.types()
	t := types.agreed()
	switch {
	case openMetrics && types&(1<<counter) != 0 && !g.fits(counter):
		return toPart
	case t == conflicting, !openMetrics && g.contradicts(t):
		return toSplit
	case !openMetrics && t == gaugeHistogram, openMetrics && !g.fits(t):
		return toYield
	}
	return stays
}

// claimer returns which group claims a name for its samples, -1 if none does.
func claimer(groups []group, name []byte, openMetrics bool) int {
	end := max(bytes.LastIndexByte(name, '_'), 0)
	if types := claimers(string(name[end:]), openMetrics); types != 0 {
		if i, found := find(groups, name[:end]); found && groups[i].types()&types != 0 {
			return i
		}
	}
	return -1
}

// settle carries out the verdicts, and reports whether that changed a family. Those that
// are split are in conflict.
func (m *merged) settle(verdicts []verdict) bool {
	if !slices.ContainsFunc(verdicts, func(v verdict) bool { return v != stays }) {
		return false
	}
	var rest []*part
	var changed [][]*part
	for i, g := range m.groups {
		v := verdicts[i]
		if v == toSplit {
			m.conflicts = append(m.conflicts, m.finding(g))
		}
		for _, p := range g {
			switch {
			case v == stays:
				rest = append(rest, p)
			case v == toFold:
				folded := *p.family
				folded.fold(p.body)
				p.family = &folded
				changed = append(changed, []*part{p})
			case v == toPart && p.metricType != counter && (p.metricType != untyped || p.bare):
				changed = append(changed, []*part{p})
			default:
				changed = append(changed, p.split())
			}
		}
	}
	m.groups = groupsOf(mergeParts([][]*part{rest, mergeParts(changed)}))
	return true
}

// split returns the lines of a part as families without a type, one for each sample name.
func (p *part) split() []*part {
	e := &exposition{openMetrics: p.body.openMetrics, loose: p.body.loose, telling: p.body.telling}
	e.buf = make([]byte, 0, p.sizeAnew())
	l := labeller{e: e, added: &addedLabels{}, anew: true, lost: p.metricType}
	if l.lost == untyped {
		l.lost = unknown
	}
	l.rewrite(p.body, p.family)
	e.regroup(math.MaxInt)
	return e.parts(p.rank)
}

// sampleName returns where the name in the line at stands.
func (e *exposition) sampleName(at uint32) span {
	if e.buf[at] != '{' {
		return span{at, at + uint32(bytes.IndexAny(e.buf[at:], "{ "))}
	}
	end := at + 2
	for e.buf[end] != '"' {
		if e.buf[end] == '\\' {
			end++
		}
		end++
	}
	return span{at + 2, end}
}

// dropRepeats leaves out samples whose series an earlier body has.
func (m *merged) dropRepeats(ctx context.Context) error {
	for i, g := range m.groups {
		if !g.mayRepeat() {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		distinct, repeats := g.distinct()
		if repeats > 0 {
			m.groups[i] = distinct
			m.duplicates += repeats
			m.repeating = append(m.repeating, m.finding(g))
		}
	}
	return nil
}

// mayRepeat reports whether two bodies may have the same series in the family.
func (g group) mayRepeat() bool {
	untold := func(p *part) bool { return !p.body.telling }
	return g[0].rank != g[len(g)-1].rank && slices.ContainsFunc(g, untold)
}

// distinct returns a group without the samples whose series an earlier body has, and how
// many those are. What one body has twice stays. Series are told apart by 128 bits of
// keyed hash: two of a million have the same with a probability of 10⁻²⁷.
func (g group) distinct() (distinct group, repeats int) {
	first, second := maphash.MakeSeed(), maphash.MakeSeed()
	ranks := map[[2]uint64]int32{} // of the first body that has the series
	var series []byte
	for _, p := range g {
		rest := *p
		lines := parserOf(p.text(p.run), p.body.openMetrics)
		for lines.next() {
			series = lines.appendLabels(append(series[:0], lines.name...), "")
			hash := [2]uint64{maphash.Bytes(first, series), maphash.Bytes(second, series)}
			if rank, found := ranks[hash]; !found {
				ranks[hash] = p.rank
			} else if rank != p.rank {
				kept := rest // even if it has no lines: it may have the HELP text or the type
				kept.run.to = p.run.from + uint32(lines.start)
				rest.run.from = p.run.from + uint32(lines.pos)
				distinct = append(distinct, &kept)
				repeats++
			}
		}
		distinct = append(distinct, &rest)
	}
	return distinct, repeats
}

// appendLabels appends the sample's labels in the order of their names, without the one of
// that name. An empty label is no label.
func (p *parser) appendLabels(dst []byte, without string) []byte {
	for _, l := range p.byName() {
		name, value := p.labelName(l), p.labelText(l)
		if len(value) > 0 && string(name) != without {
			dst = append(append(dst, '"'), name...)
			dst = append(append(dst, '"'), value...)
		}
	}
	return dst
}

// addOwn puts the program's own metrics on the page, after all others, as they come. Of a family that a
// source has too, the source's HELP text and type stay, and its samples where they are of
// the same series.
func (m *merged) addOwn(own ...*exposition) {
	n := len(m.groups)
	for _, e := range own {
		for _, p := range e.parts(math.MaxInt32) {
			f := *p.family
			p.family = &f
			if m.openMetrics && !p.findPlace(m.groups[:n]) {
				continue
			}
			at, found := find(m.groups[:n], p.text(f.name))
			if !found {
				m.groups = append(m.groups, group{p})
				continue
			}
			if m.groups[at].types().agreed() != untyped {
				f.metricType = untyped
			}
			m.groups[at], _ = append(m.groups[at], p).distinct()
		}
	}
}

// findPlace gives a family of the program's own the name and the type that OpenMetrics and
// the families of the sources leave for it. It is false if they leave none.
func (p *part) findPlace(groups []group) bool {
	g := group{p}
	if full := p.name; p.metricType == counter {
		_, total := find(groups, g.name())
		p.name.to -= uint32(len("_total"))
		_, created := find(groups, append(slices.Clone(g.name()), "_created"...))
		at, found := find(groups, g.name())
		p.bare = found && groups[at].types().agreed() != counter || !found && (total || created)
		if !p.bare {
			return true
		}
		p.name, p.metricType = full, untyped
	}
	if at, found := find(groups, g.name()); found {
		t := groups[at].types().agreed()
		return t == untyped || t == unknown || t == gauge
	}
	return claimer(groups, g.name(), true) < 0
}

// page is one valid exposition, ready to be written. It refers to long runs of lines
// where they are and holds the rest.
type page struct {
	chunks [][]byte
	size   int
	tail   []byte // the chunk being filled

	openMetrics bool // its format
	findings
}

// write writes the page. It fails if ctx ends.
func (m *merged) write(ctx context.Context) (*page, error) {
	pg := &page{openMetrics: m.openMetrics, findings: m.findings}
	for _, g := range m.groups {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		pg.addFamily(g)
	}
	if pg.openMetrics {
		pg.tail = append(pg.tail, "# EOF\n"...)
	}
	pg.flush()
	return pg, nil
}

// addFamily adds one family: its HELP, TYPE and UNIT lines and all its samples.
func (pg *page) addFamily(g group) {
	if cap(pg.tail)-len(pg.tail) < 1<<10 {
		pg.flush()
		pg.tail = make([]byte, 0, 32<<10)
	}
	for _, p := range g {
		if p.help.from < p.help.to {
			text := p.text(p.help)
			if pg.openMetrics {
				text = []byte(quoteHelp.Replace(string(text)))
			}
			pg.addMetadata("# HELP ", g, text)
			break
		}
	}
	if !pg.openMetrics {
		pg.addMetadata("# TYPE ", g, []byte(typeNames[g.types().agreed()]))
	} else {
		pg.addMetadata("# TYPE ", g, []byte(openMetricsNames[g.types().agreed()]))
		if name, n := g.name(), int(g.unit()); n > 0 {
			pg.addMetadata("# UNIT ", g, name[len(name)-n:])
		}
	}
	for _, p := range g {
		pg.addLines(p.text(p.run))
	}
}

// addMetadata adds a HELP, TYPE or UNIT line.
func (pg *page) addMetadata(what string, g group, text []byte) {
	out, name := append(pg.tail, what...), g.name()
	if g[0].quoted && !isBareName(name) {
		out = append(append(append(out, '"'), name...), '"')
	} else {
		out = append(out, name...)
	}
	pg.tail = append(append(append(out, ' '), text...), '\n')
}

// addLines adds lines: short ones are copied, long ones referred to.
func (pg *page) addLines(lines []byte) {
	if len(lines) < 1<<10 {
		pg.tail = append(pg.tail, lines...)
		return
	}
	pg.flush()
	pg.chunks = append(pg.chunks, lines)
	pg.size += len(lines)
}

// flush ends the chunk being filled.
func (pg *page) flush() {
	if len(pg.tail) > 0 {
		pg.chunks = append(pg.chunks, pg.tail)
		pg.size += len(pg.tail)
		pg.tail = pg.tail[len(pg.tail):]
	}
}

// ---- Status metrics

// ownMetrics are metrics of the program's own, by the names of their families.
type ownMetrics map[string]*ownFamily

// ownFamily is one of these families.
type ownFamily struct {
	metricType metricType
	help       string
	lines      []byte
}

// add adds a sample with the labels of pairs, one at least, to a family.
func (m ownMetrics) add(name string, t metricType, help string, value float64, pairs ...string) {
	f := m[name]
	if f == nil {
		f = &ownFamily{metricType: t, help: help}
		m[name] = f
	}
	open := byte('{')
	out := append(f.lines, name...)
	for i := 0; i < len(pairs); i += 2 {
		out = append(append(append(out, open), pairs[i]...), `="`...)
		out = append(append(out, escape.Replace(strings.ToValidUTF8(pairs[i+1], "\uFFFD"))...), '"')
		open = ','
	}
	out = append(out, "} "...)
	f.lines = append(strconv.AppendFloat(out, value, 'g', -1, 64), '\n')
}

// one adds a sample that tells of the program.
func (m ownMetrics) one(name string, t metricType, help string, value float64, pairs ...string) {
	m.add(name, t, help, value, append(pairs, "exporter_name", ownName)...)
}

// body returns the metrics as an exposition.
func (m ownMetrics) body() *exposition {
	e := &exposition{}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		own := m[name]
		f := family{name: e.add([]byte(name)), help: e.add([]byte(own.help)), metricType: own.metricType, bare: true}
		f.lines = e.add(own.lines)
		e.families = append(e.families, f)
	}
	return e
}

// addSources adds what is to be told of each source.
func (m ownMetrics) addSources(sources []*source, results []*result) {
	for i, s := range sources {
		r, c := results[i], s.snapshot()
		add := func(name string, t metricType, help string, value float64) {
			m.add(name, t, help, value, "exporter_name", s.name)
		}
		add(ownName+"_source_up", gauge, "Whether the source delivered for this scrape.", oneIf(r.failure == nil))
		if !r.start.IsZero() { // or it missed the deadline
			add(ownName+"_source_scrape_duration_seconds", gauge, "How long the fetch took.",
				r.end.Sub(r.start).Seconds())
		}
		add(ownName+"_source_samples_scraped", gauge, "Samples that the source delivered.", float64(r.samples()))
		add(ownName+"_source_body_bytes", gauge, "Size of what the source delivered, decompressed.", float64(r.bytes))
		add(ownName+"_source_last_success_timestamp_seconds", gauge,
			"When the last fetch succeeded, 0 before the first.", unixSeconds(c.lastSuccess))
		add(ownName+"_source_timeout_seconds", gauge, "Longest time that a fetch may take.", s.timeout.Seconds())
		if len(s.drop) > 0 {
			add(ownName+"_source_families_dropped", gauge, "Metric families that --drop left out.",
				float64(r.dropped()))
		}
		if r.exit != nil {
			add(ownName+"_source_exit_status", gauge, "Exit status of the command.", float64(*r.exit))
		}
		add(ownName+"_source_fetches_total", counter, "Fetches that ended and were not abandoned by their scrapers.",
			float64(c.fetches))
		for _, reason := range reasons[s.kind] {
			m.add(ownName+"_source_failures_total", counter, "Failed fetches, and scrapes that found the source busy.",
				float64(c.failures[reason]), "exporter_name", s.name, "reason", reason)
		}
		for _, f := range r.files {
			m.add(ownName+"_file_mtime_seconds", gauge, "When the file was last modified.",
				unixSeconds(f.mtime), "exporter_name", s.name, "file", f.name)
		}
	}
}

// addFindings adds how often something was found, and for each source concerned in how many
// families.
func (m ownMetrics) addFindings(name, help string, total int, list []finding) {
	m.one(name, gauge, help, float64(total))
	families := map[string]int{}
	for _, f := range list {
		for _, source := range f.sources {
			families[source]++
		}
	}
	for _, source := range slices.Sorted(maps.Keys(families)) {
		m.add(name, gauge, help, float64(families[source]), "exporter_name", source)
	}
}

// addProgram adds what is to be told of the page and the program.
func (m ownMetrics) addProgram(p *program, found *findings) {
	m.addFindings(ownName+"_conflicting_families", "Metric families served untyped, as the sources disagree on them.",
		len(found.conflicts), found.conflicts)
	m.addFindings(ownName+"_duplicate_series_dropped", "Samples left out, as an earlier source has the same series."+
		" For a source: families concerned.", found.duplicates, found.repeating)
	m.one(ownName+"_build_info", gauge, "The version of the program.", 1,
		"version", p.build.version, "revision", p.build.revision, "goversion", runtime.Version())
	m.one(ownName+"_log_lines_dropped_total", counter, "Lines of the log that could not be written.",
		float64(p.dropped.Load()))
	if cert := p.tls.cert.Load(); cert != nil {
		m.one(ownName+"_tls_certificate_expiry_timestamp_seconds", gauge,
			"When the certificate of the program expires.",
			unixSeconds(cert.Leaf.NotAfter))
	}
	for _, w := range p.watched {
		m.add(ownName+"_last_reload_successful", gauge,
			"Whether the files that the flag names could be taken up when they last changed.",
			oneIf(!w.broken.Load()), "exporter_name", ownName, "flag", w.files[0].flag)
	}
	if p.tls.cas.Load() != nil || p.passwords != nil {
		m.one(ownName+"_requests_refused_total", counter, "Requests without a right password or client certificate.",
			float64(p.refusals.Load()))
	}
}

// readProcess reads the metrics of the process. Those that the system does not tell, as
// where there is no /proc, are left out.
func readProcess(started time.Time) *exposition {
	m := ownMetrics{}
	memory := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/total:bytes"}}
	metrics.Read(memory) // runtime.ReadMemStats would stop the world
	m.one("go_info", gauge, "Information about the Go environment.", 1, "version", runtime.Version())
	m.one("go_goroutines", gauge, "Number of goroutines that currently exist.", float64(runtime.NumGoroutine()))
	m.one("go_memstats_heap_alloc_bytes", gauge, "Number of heap bytes allocated and currently in use.",
		float64(memory[0].Value.Uint64()))
	m.one("go_memstats_sys_bytes", gauge, "Number of bytes obtained from system.", float64(memory[1].Value.Uint64()))

	m.one("process_start_time_seconds", gauge, "Start time of the process since unix epoch in seconds.",
		unixSeconds(started))
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) == nil {
		m.one("process_cpu_seconds_total", counter, "Total user and system CPU time spent in seconds.",
			float64(usage.Utime.Nano()+usage.Stime.Nano())/1e9)
	}
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		m.one("process_max_fds", gauge, "Maximum number of open file descriptors.", float64(limit.Cur))
	}
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		m.one("process_open_fds", gauge, "Number of open file descriptors.", float64(len(fds)))
	}
	statm, _ := os.ReadFile("/proc/self/statm")
	if sizes := strings.Fields(string(statm)); len(sizes) >= 2 {
		virtual, _ := strconv.ParseFloat(sizes[0], 64)
		resident, _ := strconv.ParseFloat(sizes[1], 64)
		page := float64(os.Getpagesize())
		m.one("process_virtual_memory_bytes", gauge, "Virtual memory size in bytes.", virtual*page)
		m.one("process_resident_memory_bytes", gauge, "Resident memory size in bytes.", resident*page)
	}
	return m.body()
}

// oneIf returns 1 for true.
func oneIf(so bool) float64 {
	if so {
		return 1
	}
	return 0
}

// unixSeconds returns a time as a metric has it, 0 for none.
func unixSeconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1e3
}

// ---- Sharing pages

// pages shares the pages of scrapes that would render the same.
type pages struct {
	turn  turn          // to render and to compress, which take much memory
	freed chan struct{} // has room for one who tells that a page was closed

	mu    sync.Mutex    // guards alive, and the readers and the compressed form of each page
	alive []*sharedPage // oldest first
	ratio float64       // compressed to plain size of the last page; for the one who has the turn

	zippers sync.Pool // of *gzip.Writer, which take 1.2 MB
}

// maxPages is how many pages may be alive at once, and maxPageBytes how large they may be
// together when another is made. If need be, the readers of the oldest are cut off, unless it
// is younger than readTime.
const maxPages, maxPageBytes, readTime = 8, 128 << 20, 500 * time.Millisecond

// pageRequest is what a scraper wants.
type pageRequest struct {
	client  string // see clientOf
	sources []*source
	forms   []form           // that it takes: OpenMetrics if it is as welcome as text, and text
	gzip    bool             // it takes the page compressed
	newest  func() []*result // holds the newest results of the sources
	render  func(ctx context.Context, results []*result, f form) (*page, error)
}

// form returns the form that the scraper gets a page of these results in. Without a body in
// OpenMetrics, nor a name that needs quotes, that is what every scraper takes.
func (want *pageRequest) form(results []*result) form {
	f := want.forms[len(want.forms)-1]
	if slices.ContainsFunc(results, (*result).openMetrics) {
		f = want.forms[0]
	}
	f.quoted = f.quoted && slices.ContainsFunc(results, (*result).quoted)
	return f
}

// sharedPage is a page and those who read it.
type sharedPage struct {
	*page
	sources []*source
	results []*result
	form    form
	zipped  []byte // nil until a scraper wants it
	made    time.Time
	readers int
	ctx     context.Context // done when its readers are to be cut off
	cut     context.CancelFunc
}

// open returns a page of the newest results: one that is alive, or a new one, for which the
// scrape waits its turn. It fails if ctx ends. Scrapes that wait hold no results, and once
// the first of them has made a page, the others mostly find that it is theirs, too.
func (ps *pages) open(ctx context.Context, want *pageRequest) (*sharedPage, error) {
	if sp := ps.join(want, want.gzip); sp != nil {
		return sp, nil
	}
	if err := ps.turn.wait(ctx, want.client); err != nil {
		return nil, err
	}
	defer ps.turn.pass()
	var err error
	sp := ps.join(want, false)
	if sp == nil {
		if sp, err = ps.render(ctx, want); err != nil {
			return nil, err
		}
	}
	if want.gzip && sp.zipped == nil {
		err = ps.zip(ctx, sp)
	}
	if err != nil {
		ps.close(sp)
		return nil, err
	}
	return sp, nil
}

// join adds a reader to the page alive that would be the same, and returns it. It returns
// nil if there is none, or none compressed if it has to be.
func (ps *pages) join(want *pageRequest, zipped bool) *sharedPage {
	results := want.newest()
	defer releaseAll(results) // a page alive holds them
	f := want.form(results)
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, sp := range ps.alive {
		same := sp.form == f && slices.Equal(sp.sources, want.sources) && slices.Equal(sp.results, results)
		if same && (sp.zipped != nil || !zipped) {
			sp.readers++
			return sp
		}
	}
	return nil
}

// render renders a page once there is room for it.
func (ps *pages) render(ctx context.Context, want *pageRequest) (sp *sharedPage, err error) {
	if err := ps.makeRoom(ctx); err != nil {
		return nil, err
	}
	results := want.newest()
	defer func() { // after a panic, too
		if sp == nil {
			releaseAll(results)
		}
	}()
	f := want.form(results)
	pg, err := want.render(ctx, results, f)
	if err != nil {
		return nil, err
	}
	sp = &sharedPage{page: pg, sources: want.sources, results: results, form: f, readers: 1}
	sp.ctx, sp.cut = context.WithCancel(context.Background())
	ps.mu.Lock()
	defer ps.mu.Unlock()
	sp.made = time.Now()
	ps.alive = append(ps.alive, sp)
	return sp, nil
}

// makeRoom waits until there is room for a page. It fails if ctx ends.
func (ps *pages) makeRoom(ctx context.Context) error {
	for wait := ps.cutOldest(); wait > 0; wait = ps.cutOldest() {
		select {
		case <-ps.freed:
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// cutOldest cuts off the readers of the oldest page, if there is no room for another one.
// It returns how long that has to wait if the oldest is too young.
func (ps *pages) cutOldest() (wait time.Duration) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	size := 0
	for _, sp := range ps.alive {
		size += sp.size
	}
	if len(ps.alive) < maxPages && size <= maxPageBytes {
		return 0
	}
	if wait = readTime - time.Since(ps.alive[0].made); wait <= 0 {
		ps.alive[0].cut()
		ps.alive = slices.Delete(ps.alive, 0, 1)
	}
	return wait
}

// close takes a reader off a page, which is dropped with its last.
func (ps *pages) close(sp *sharedPage) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if sp.readers--; sp.readers > 0 {
		return
	}
	sp.cut()
	ps.alive = slices.DeleteFunc(ps.alive, func(other *sharedPage) bool { return other == sp })
	releaseAll(sp.results)
	select {
	case ps.freed <- struct{}{}:
	default:
	}
}

// releaseAll releases the results of a page.
func releaseAll(results []*result) {
	for _, r := range results {
		r.release()
	}
}

// zip compresses a page. It fails if ctx ends.
func (ps *pages) zip(ctx context.Context, sp *sharedPage) error {
	z, ok := ps.zippers.Get().(*gzip.Writer)
	if !ok {
		z, _ = gzip.NewWriterLevel(nil, gzip.BestSpeed)
	}
	defer func() {
		z.Reset(nil) // or it would hold the page
		ps.zippers.Put(z)
	}()
	var out bytes.Buffer
	out.Grow(int(1.1*ps.ratio*float64(sp.size)) + 1<<10) // or it would grow by doubling
	z.Reset(&out)
	for _, chunk := range sp.chunks {
		if err := ctx.Err(); err != nil {
			return err
		}
		z.Write(chunk)
	}
	z.Close()
	ps.mu.Lock()
	defer ps.mu.Unlock()
	sp.zipped = out.Bytes()
	sp.made = time.Now() // who waited for it begins to read now
	ps.ratio = float64(len(sp.zipped)) / float64(sp.size)
	return nil
}
