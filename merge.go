// This file turns results into a page that scrapers share.
//
// merge puts any number of expositions on one page. It moves families and refers to their
// lines as ranges of bytes, so that its work grows with the number of families, not of samples.
// Only lines that another format writes differently, and families that sources disagree on, take more.

package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"maps"
	"math"
	"os"
	"runtime"
	"runtime/debug"
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
	groups []group
	form   form
	names  []string // of the sources of the bodies
	*findings
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
	return cmp.Or(cmp.Compare(p.rank, other.rank), cmp.Compare(p.order, other.order))
}

// group is all parts of one family on the page, in order.
type group []*part

// merge merges bodies for a page of a form, which each of them has already: as one exposition, or several if some
// of its families had to be changed for that. names are those of their sources. It fails if ctx ends.
func merge(ctx context.Context, bodies [][]*exposition, names []string, f form) (*merged, error) {
	var lists [][]*part
	for rank, body := range bodies {
		for _, e := range body {
			lists = append(lists, e.parts(int32(rank)))
		}
	}
	groups, empty := withoutEmpty(groupsOf(mergeParts(lists)))
	m := &merged{groups: groups, form: f, names: names}
	m.findings = &findings{map[string]int{}, map[string]int{}, map[pair]*concern{}}
	if !f.protobuf { // there, families of one name and several types stand beside each other
		if err := m.settle(ctx, judge(m.groups, f)); err != nil {
			return nil, err
		}
	}
	if len(empty) > 0 && !f.strict && !f.protobuf { // those do without them
		m.addEmpty(empty)
	}
	return m, m.dropRepeats(ctx)
}

// renew puts the program's own metrics in the place of those on the page that differ from them in
// values only: what could not be merged is known once they are merged.
func (m *merged) renew(old, own *exposition) {
	byName := func(f family, name []byte) int { return bytes.Compare(own.text(f.name), name) }
	for _, g := range m.groups {
		for _, p := range g {
			if p.body != old {
				continue
			}
			i, _ := slices.BinarySearchFunc(own.families, p.text(p.name), byName)
			f := own.families[i]
			f.metricType = p.metricType // they may be in conflict
			p.body, p.family, p.run = own, &f, f.lines
		}
	}
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

// mergeParts merges lists that are in order. Of parts that compare alike, those of an earlier list come first.
func mergeParts(lists [][]*part) []*part {
	half := len(lists) / 2
	if half == 0 {
		return slices.Concat(lists...)
	}
	a, b := mergeParts(lists[:half]), mergeParts(lists[half:])
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

// withoutEmpty splits off the families that have no samples. From the others it drops the parts that have none:
// one source's metadata must not decide the type of another source's samples.
func withoutEmpty(all []group) (groups []group, empty []*part) {
	isEmpty := func(p *part) bool { return p.run.from == p.run.to }
	for _, g := range all {
		first := g[0]
		if g = slices.DeleteFunc(g, isEmpty); len(g) > 0 {
			groups = append(groups, g)
		} else {
			empty = append(empty, first)
		}
	}
	return groups, empty
}

// addEmpty adds families without samples, but for those whose name another one has in metadata or
// claims: for the OpenTelemetry receiver they would end it.
func (m *merged) addEmpty(empty []*part) {
	known, names := m.groups, map[string]bool{}
	for _, g := range known {
		names[string(g.name())] = true
		for _, p := range g {
			names[string(p.text(p.base()))] = true
		}
	}
	for _, p := range empty {
		if !names[string(p.text(p.base()))] && claimer(known, p.text(p.name)) < 0 {
			m.groups = append(m.groups, group{p})
		}
	}
	slices.SortFunc(m.groups, func(a, b group) int { return bytes.Compare(a.name(), b.name()) })
}

// ---- Conflicts

// verdict says whether a family can stay as it is.
type verdict uint8

const (
	stays      verdict = iota
	joins              // the family that claims the name
	splits             // into untyped families, one for each sample name
	disputes           // likewise, and is counted as conflicting: it claims the name of a family with a type
	inConflict         // likewise, and the sources that disagree are named
)

// judge returns a verdict on each group. A family is in conflict if its types differ; a family with a
// type whose name another one claims is in conflict with that. Without a type it joins that one.
func judge(groups []group, f form) []verdict {
	verdicts := make([]verdict, len(groups))
	var claims [][2]int // a family without a type, and the one before it that claims its name
	for i, g := range groups {
		t := g.types().agreed()
		switch {
		case t == conflicting, f.strict && g.contradicts(t):
			verdicts[i] = inConflict
		case t == gaugeHistogram && !f.openMetrics:
			verdicts[i] = splits
		}
		switch c := claimer(groups, g.name()); {
		case c < 0:
		case t != untyped, f.strict && g.contradicts(groups[c].types().agreed()):
			verdicts[i], verdicts[c] = inConflict, max(verdicts[c], disputes)
		default:
			claims = append(claims, [2]int{i, c})
		}
	}
	for _, c := range claims {
		if verdicts[c[1]] == stays {
			verdicts[c[0]] = joins
		}
	}
	return verdicts
}

// contradicts reports whether a sample of the group speaks against the type.
func (g group) contradicts(t metricType) bool {
	return slices.ContainsFunc(g, func(p *part) bool {
		return t == histogram && p.noHistogram || t == summary && p.noSummary
	})
}

// claimer returns which group claims a name for its samples, -1 if none does.
func claimer(groups []group, name []byte) int {
	end := max(bytes.LastIndexByte(name, '_'), 0)
	if types := claimers(string(name[end:]), false); types != 0 {
		byName := func(g group, name []byte) int { return bytes.Compare(g.name(), name) }
		if i, found := slices.BinarySearchFunc(groups, name[:end], byName); found && groups[i].types()&types != 0 {
			return i
		}
	}
	return -1
}

// settle carries out the verdicts. It fails if ctx ends.
func (m *merged) settle(ctx context.Context, verdicts []verdict) error {
	if !slices.ContainsFunc(verdicts, func(v verdict) bool { return v != stays }) {
		return nil
	}
	var rest, joined []*part
	var lists [][]*part
	for i, g := range m.groups {
		if err := ctx.Err(); err != nil {
			return err
		}
		if verdicts[i] >= disputes {
			for _, source := range m.sourcesOf(g) {
				m.conflicting[source]++
			}
		}
		if verdicts[i] == inConflict {
			both := g
			if c := claimer(m.groups, g.name()); c >= 0 {
				both = slices.Concat(m.groups[c], g)
			}
			m.disagree(typesDiffer, both)
		}
		for _, p := range g {
			switch {
			case verdicts[i] == stays:
				rest = append(rest, p)
			case verdicts[i] == joins:
				joined = append(joined, p.joining())
			case p.otherName || !m.form.strict && (p.metricType == histogram || p.metricType == summary):
				lists = append(lists, p.split(!m.form.strict))
			default:
				f := *p.family
				f.metricType, f.suffix, f.unit = untyped, 0, 0
				rest = append(rest, p.with(f))
			}
		}
	}
	slices.SortStableFunc(joined, (*part).compare)
	m.groups = groupsOf(mergeParts(append(lists, rest, joined)))
	return nil
}

// with returns the part as one of another family.
func (p *part) with(f family) *part {
	other := *p
	other.family = &f
	return &other
}

// joining returns the part as one of the family that claims its name.
func (p *part) joining() *part {
	f := *p.family
	f.name.to = f.name.from + uint32(bytes.LastIndexByte(p.text(f.name), '_'))
	f.help.to = f.help.from // it says what h_count is, not what h is
	f.unit, f.otherName = 0, true
	return p.with(f)
}

// split returns the part as families without a type, one for each sample name.
func (p *part) split(exact bool) []*part {
	e := &exposition{format: p.body.format, cameAsText: p.body.cameAsText, telling: p.body.telling}
	l := newLabeller(e, &addedLabels{})
	l.rewrite(p.body, p.family, true, exact)
	l.finish()
	return e.parts(p.rank)
}

// ---- Repeats

// dropRepeats leaves out samples whose series an earlier body has. Where labels tell all bodies apart, none can.
func (m *merged) dropRepeats(ctx context.Context) error {
	untold := func(p *part) bool { return !p.body.telling }
	for i, g := range m.groups {
		if g[0].rank == g[len(g)-1].rank || !slices.ContainsFunc(g, untold) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		distinct, repeats := g.distinct()
		if len(repeats) > 0 {
			m.groups[i] = distinct
			m.disagree(sameSeries, g)
		}
		for rank, n := range repeats {
			m.repeated[m.names[rank]] += n
		}
	}
	return nil
}

// distinct returns a group without the samples whose series an earlier body has, and how
// many those are, by body. What one body has twice stays. Series are told apart by 128 bits of
// keyed hash: two of a million have the same with a probability of 10⁻²⁷.
func (g group) distinct() (distinct group, repeats map[int32]int) {
	first, second := maphash.MakeSeed(), maphash.MakeSeed()
	ranks := map[[2]uint64]int32{} // of the first body that has the series
	repeats = map[int32]int{}
	var series []byte
	for _, p := range g {
		rest := *p
		lines := parserOf(p.text(p.run), p.body.format)
		// A metric of protobuf has no name: this stands for it, as a histogram has other series than a gauge.
		lines.samples, lines.metricType, lines.name = 1, p.metricType, []byte(boundLabels[p.metricType])
		for lines.next() {
			series = lines.appendSeries(append(series[:0], lines.name...))
			hash := [2]uint64{maphash.Bytes(first, series), maphash.Bytes(second, series)}
			if rank, found := ranks[hash]; !found {
				ranks[hash] = p.rank
			} else if rank != p.rank {
				kept, isFirst := rest, rest.run == p.run
				kept.run.to = p.run.from + uint32(lines.start)
				rest.run.from = p.run.from + uint32(lines.pos)
				if isFirst || kept.run.from < kept.run.to { // the first may have the HELP text or the type
					distinct = append(distinct, &kept)
				}
				repeats[p.rank] += lines.samples
			}
		}
		distinct = append(distinct, &rest)
	}
	return distinct, repeats
}

// appendSeries appends the sample's labels in the order of their names. An empty label is no label.
func (p *parser) appendSeries(dst []byte) []byte {
	for _, l := range p.byName() {
		name, value := p.labelName(l), p.labelText(l)
		if len(value) > 0 {
			dst = append(append(dst, '"'), name...)
			dst = append(append(dst, '"'), value...)
		}
	}
	return dst
}

// ---- Findings

// findings are what could not be merged as it came.
type findings struct {
	conflicting map[string]int // metric families served untyped, by source
	repeated    map[string]int // samples left out, by source
	pairs       map[pair]*concern
}

// pair is two sources that disagree; both are the same if its own bodies do.
type pair struct {
	what       discord
	one, other string // in the order of the flags
}

// discord is why families could not be merged as they came.
type discord string

const (
	typesDiffer discord = "the types of metric families differ: they are served untyped"
	sameSeries  discord = "sources without a telling label have the same series: the first is served; " +
		"take one out of --raw, or --label it (files of one pattern need labels of their own)"
)

// concern is which metric families two sources are at odds about.
type concern struct {
	families int
	first    []string // a few of their names
}

// sourcesOf returns the sources that keep a group from being merged: if several have a type for it, those, or all.
func (m *merged) sourcesOf(g group) (sources []string) {
	typed := slices.DeleteFunc(slices.Clone(g), func(p *part) bool { return p.metricType == untyped })
	if len(typed) > 0 && typed[0].rank != typed[len(typed)-1].rank {
		g = typed
	}
	for _, p := range g {
		sources = append(sources, m.names[p.rank])
	}
	return slices.Compact(sources)
}

// disagree keeps which sources are at odds about a family: the first with each other one, or one with itself.
func (m *merged) disagree(what discord, g group) {
	sources := m.sourcesOf(g)
	for _, other := range sources[min(1, len(sources)-1):] {
		m.add(pair{what, sources[0], other}, string(g.name()))
	}
}

// add keeps that two sources are at odds about a family, if they are among the first thousand pairs.
func (f *findings) add(about pair, family string) {
	c := cmp.Or(f.pairs[about], &concern{})
	c.families++
	if len(c.first) < 3 {
		c.first = append(c.first, strings.ToValidUTF8(family[:min(len(family), 80)], ""))
	}
	if c.families > 1 || len(f.pairs) < 1000 {
		f.pairs[about] = c
	}
}

// ---- Writing

// page is one valid exposition, ready to be written. It refers to long runs of lines and holds the rest.
type page struct {
	chunks [][]byte
	size   int
	tail   []byte     // the chunk being filled
	own    []*chunk   // what the chunks of its own are in
	pool   *sync.Pool // of chunks
	form   form
	*findings
}

// chunk is memory of a page, and of its way to a reader.
type chunk [32 << 10]byte

// write writes the page, in chunks of a pool where it holds text of its own. It fails if ctx ends.
func (m *merged) write(ctx context.Context, pool *sync.Pool) (*page, error) {
	pg := &page{form: m.form, findings: m.findings, pool: pool}
	for _, g := range m.groups {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if cap(pg.tail)-len(pg.tail) < 1<<10 {
			pg.nextChunk()
		}
		if pg.form.protobuf {
			pg.addMessages(g)
		} else {
			pg.addFamily(g)
		}
	}
	if pg.form.openMetrics {
		pg.tail = append(pg.tail, "# EOF\n"...)
	}
	pg.flush()
	return pg, nil
}

// Write adds text to the page.
func (pg *page) Write(text []byte) (int, error) {
	if cap(pg.tail)-len(pg.tail) < len(text) {
		pg.nextChunk()
	}
	pg.tail = append(pg.tail, text...)
	return len(text), nil
}

// nextChunk begins another chunk.
func (pg *page) nextChunk() {
	pg.flush()
	pg.own = append(pg.own, pg.pool.Get().(*chunk))
	pg.tail = pg.own[len(pg.own)-1][:0]
}

// free gives the chunks of the page's own back, once nobody reads it.
func (pg *page) free() {
	for _, own := range pg.own {
		pg.pool.Put(own)
	}
}

// addFamily adds one family. As it came, parts whose metadata has another name stand apart: those
// of a counter foo with samples foo_total beside those of a counter foo_total.
func (pg *page) addFamily(g group) {
	if !pg.form.strict {
		first := g[max(0, slices.IndexFunc(g, func(p *part) bool { return p.metricType != untyped }))]
		mayBeLost := pg.form.openMetrics && isStartTime(first.metricType, g.name())
		apart := func(p *part) bool {
			return p.metricType != untyped && p.suffix != first.suffix ||
				mayBeLost && p.metricType == untyped && p.body.cameAsText
		}
		if slices.ContainsFunc(g, apart) {
			together := func(p *part) bool { return !apart(p) }
			pg.addFamily(slices.DeleteFunc(slices.Clone(g), apart))
			pg.addFamily(slices.DeleteFunc(slices.Clone(g), together))
			return
		}
	}
	pg.addMetadata(g)
	pg.addLines(g)
}

// addMessages adds a message for each type that a family has, untyped first, as Prometheus keeps the last.
// Exemplars of native histograms need one for each part, or Prometheus would lose some. Who shows no escaping
// gets one, for Telegraf keeps the last of a name.
func (pg *page) addMessages(g group) {
	for t := untyped; t <= gaugeHistogram; t++ {
		isOther := func(p *part) bool { return p.metricType != t || p.run.from == p.run.to }
		for parts := slices.DeleteFunc(slices.Clone(g), isOther); len(parts) > 0; {
			n := len(parts)
			if !pg.form.strict && slices.ContainsFunc(parts, func(p *part) bool { return p.moments }) {
				n = 1
			}
			pg.addMessage(parts[:n], g.help())
			parts = parts[n:]
		}
	}
}

// addMessage adds a message with the metrics of parts that have one type.
func (pg *page) addMessage(g group, help []byte) {
	head := appendBytes(appendBytes(nil, 1, g.name()), 2, help)
	head = appendInteger(head, 3, uint64(slices.Index(protobufTypes[:], g[0].metricType)))
	hasUnit := func(p *part) bool { return p.unit > 0 }
	if i := slices.IndexFunc(g, hasUnit); i >= 0 {
		head = appendBytes(head, 5, g[i].body.unitText(g[i].family))
	}
	size := 0
	for _, p := range g {
		size += len(p.text(p.run))
	}
	pg.tail = append(binary.AppendUvarint(pg.tail, uint64(len(head)+size)), head...)
	pg.addLines(g)
}

// help returns the first HELP text that there is.
func (g group) help() []byte {
	withHelp := func(p *part) bool { return p.help.from < p.help.to }
	p := g[max(0, slices.IndexFunc(g, withHelp))]
	return p.text(p.help)
}

// addMetadata adds the HELP, TYPE and UNIT lines of a family: of each the first that there is.
func (pg *page) addMetadata(g group) {
	named := g[max(0, slices.IndexFunc(g, func(p *part) bool { return p.suffix > 0 }))]
	name, names, help := named.text(named.base()), &typeNames, g.help()
	if pg.form.strict {
		name = named.text(named.name)
	}
	if pg.form.openMetrics {
		names, help = &openMetricsNames, bytes.ReplaceAll(help, []byte(`"`), []byte(`\"`))
	}
	if len(help) > 0 {
		pg.addLine("# HELP ", name, help)
	}
	pg.addLine("# TYPE ", name, []byte(names[g.types().agreed()]))
	hasUnit := func(p *part) bool { return p.unit > 0 && p.suffix == named.suffix }
	if i := slices.IndexFunc(g, hasUnit); i >= 0 && pg.form.openMetrics {
		pg.addLine("# UNIT ", name, g[i].body.unitText(g[i].family))
	}
}

// addLine adds a line of metadata.
func (pg *page) addLine(what string, name, text []byte) {
	out := append(pg.tail, what...)
	if isBareName(name) {
		out = append(out, name...)
	} else {
		out = append(append(append(out, '"'), name...), '"')
	}
	pg.tail = append(append(append(out, ' '), text...), '\n')
}

// addLines adds the lines of a family: short ones are copied, long ones referred to.
func (pg *page) addLines(g group) {
	for _, p := range g {
		lines := p.text(p.run)
		if len(lines) < 1<<10 {
			pg.tail = append(pg.tail, lines...)
			continue
		}
		pg.flush()
		pg.chunks = append(pg.chunks, lines)
		pg.size += len(lines)
	}
}

// flush ends the chunk being filled.
func (pg *page) flush() {
	if len(pg.tail) > 0 {
		pg.chunks = append(pg.chunks, pg.tail)
		pg.size += len(pg.tail)
		pg.tail = pg.tail[len(pg.tail):]
	}
}

// ---- Text as protobuf

// transcript writes families of text or OpenMetrics as protobuf. Samples of histograms, summaries, and
// counters with start times make up metrics; all others stand in families of their own names.
type transcript struct {
	*labeller
	from         *exposition
	of           *family
	name         []byte     // of the family that is written
	metricType   metricType // likewise
	hasExemplars bool       // samples have them, perhaps
	metrics      []*compound
	index        map[string]*compound // by labels
	fields       []byte               // labels of the sample
	value        []byte               // its value, in protobuf
}

// compound is a metric that several samples make up.
type compound struct {
	fields, pieces, stamp []byte
	lines                 []span
	has                   int
	created               span // the line of its start time
}

// maxCompounds is how many metrics samples of one family make up. With more, they all stand alone.
const maxCompounds = 1 << 16

// What a metric has; hasInf is the bucket of +Inf, which is the last. The value of a counter is its sum.
const hasSum, hasCount, hasInf, hasPieces, hasCreated, isOdd = 1, 2, 4, 8, 16, 32

// protobufValues are the numbers of the fields for start times of values, and what a value needs.
var protobufValues = [conflicting]struct{ created, needs int }{
	counter: {3, hasSum}, summary: {4, hasSum | hasCount}, histogram: {15, hasSum | hasCount | hasInf},
}

// as returns the exposition for pages of a form, in protobuf with what Prometheus would store of it.
func (e *exposition) as(f form) []*exposition {
	if !f.protobuf || e.protobuf {
		return e.spelled(f)
	}
	anew := &exposition{format: format{protobuf: true}, cameAsText: e.cameAsText, telling: e.telling}
	anew.buf = make([]byte, 0, len(e.buf)*3/2) // as samples without labels of their own take; more would be garbage
	t := &transcript{labeller: newLabeller(anew, &addedLabels{})}
	for _, spelled := range e.spelled(form{format: e.format, quoted: f.quoted}) {
		for i := range spelled.families {
			t.family(spelled, &spelled.families[i])
		}
	}
	t.finish()
	return []*exposition{t.e}
}

// family writes a family: the metrics that samples make up, and then all other samples one by one.
func (t *transcript) family(from *exposition, f *family) {
	lines := from.text(f.lines)
	t.from, t.of, t.name = from, f, nil
	t.hasExemplars = f.moments && bytes.Contains(lines, []byte(" # {"))
	t.metrics = t.metrics[:0]
	needs := protobufValues[f.metricType].needs
	if needs > hasSum || f.created { // a histogram or a summary, or a counter with a start time
		t.index = map[string]*compound{}
		for t.p = parserOf(lines, from.format); len(t.metrics) <= maxCompounds && t.p.next(); {
			t.collect()
		}
	}
	if n := len(t.metrics); n > 0 && n <= maxCompounds {
		var rest []byte // lines of samples that make up no metric
		for _, m := range t.metrics {
			alone := m.lines
			if m.has&(needs|isOdd) == needs {
				t.write(from.text(f.name), f.metricType, m.fields, m.pieces, m.stamp)
				alone = []span{m.created} // it is a sample, too, for scrapers that do without start times
			}
			for _, s := range alone {
				rest = append(rest, lines[s.from:s.to]...)
			}
		}
		lines = rest
	}
	for t.p = parserOf(lines, from.format); t.p.next(); {
		t.single()
	}
}

// collect adds the sample to the metric that it belongs to.
func (t *transcript) collect() {
	fields, bound, isBound := t.appendLabels(t.fields[:0], true)
	t.fields = fields
	m := t.index[string(fields)]
	if m == nil {
		m = &compound{fields: bytes.Clone(fields)}
		t.index[string(fields)], t.metrics = m, append(t.metrics, m)
	}
	pieces, role := t.appendPiece(m.pieces, bound, isBound)
	line := span{uint32(t.p.start), uint32(t.p.pos)}
	switch {
	case m.has&role&^hasPieces != 0 || role == hasPieces && m.has&hasInf != 0: // it has that already
		role = isOdd
	case role == hasCreated:
		m.created = line
	case m.has&^hasCreated == 0:
		m.stamp = t.p.stamp
	case !bytes.Equal(m.stamp, t.p.stamp):
		role = isOdd
	}
	m.has |= role
	m.pieces, m.lines = pieces, append(m.lines, line)
}

// appendPiece appends the fields that the sample is in its metric, and returns what the metric has by it.
func (t *transcript) appendPiece(dst []byte, bound float64, isBound bool) (fields []byte, role int) {
	own, value := t.of.metricType, floatOf(t.p.valueText())
	isCount := value >= 0 && value < 1<<63 && value == math.Trunc(value) && !math.Signbit(value)
	switch suffix := string(bytes.TrimPrefix(t.p.name, t.from.text(t.of.base()))); {
	case suffix == "_created" && !isBound:
		if value > 0 && value < 1<<40 { // or it is no time
			dst = appendTimestamp(dst, protobufValues[own].created, int64(value*1000))
		}
		return dst, hasCreated
	case own == counter && bytes.Equal(t.p.name, t.from.text(t.of.name)):
		return t.appendExemplar(appendFloat(dst, 1, value), 2), hasSum
	case suffix == "_sum" && !isBound:
		return appendFloat(dst, 2, value), hasSum
	case suffix == "_count" && !isBound && isCount:
		return appendInteger(dst, 1, uint64(value)), hasCount
	case suffix == "_bucket" && isBound && isCount && own == histogram:
		bucket := t.appendExemplar(appendFloat(appendInteger(nil, 1, uint64(value)), 2, bound), 3)
		if role = hasPieces; math.IsInf(bound, 1) {
			role = hasInf
		}
		return appendBytes(dst, 3, bucket), role
	case suffix == "" && isBound && own == summary:
		return appendBytes(dst, 3, appendFloat(appendFloat(nil, 1, bound), 2, value)), hasPieces
	}
	return dst, isOdd
}

// single writes a sample as a metric.
func (t *transcript) single() {
	as, isCreated := untyped, t.of.created && bytes.HasSuffix(t.p.name, []byte("_created"))
	switch own := t.of.metricType.inText(); {
	case own == gauge, own == counter && !isCreated:
		as = own
	case t.hasExemplars && !isCreated: // which no other type has
		as = counter
	}
	t.fields, _, _ = t.appendLabels(t.fields[:0], false)
	t.value = appendFloat(t.value[:0], 1, floatOf(t.p.valueText()))
	if as == counter {
		t.value = t.appendExemplar(t.value, 2)
	}
	t.write(t.p.name, as, t.fields, t.value, t.p.stamp)
}

// write writes a metric with a value.
func (t *transcript) write(name []byte, as metricType, labels, value, stamp []byte) {
	if as != t.metricType || !bytes.Equal(name, t.name) {
		var help, unit []byte
		if as == t.of.metricType.inText() || bytes.Equal(name, t.from.text(t.of.name)) {
			help, unit = plainText(t.from.text(t.of.help)), t.from.unitText(t.of)
		}
		t.beginMessage(plainText(name), help, unit, as)
		t.name, t.metricType = name, as
	}
	t.series = appendBytes(append(t.series[:0], labels...), valueFields[as], value)
	if len(stamp) > 0 {
		millis, _ := strconv.ParseInt(string(stamp), 10, 64)
		if t.from.openMetrics {
			millis = millisOf(stamp)
		}
		t.series = appendInteger(t.series, 6, uint64(cmp.Or(millis, 1))) // 0 would be none
	}
	t.addMetric(t.series)
}

// appendLabels appends the labels of the sample: without its bound, or with that as Prometheus stores it.
func (t *transcript) appendLabels(dst []byte, without bool) (fields []byte, bound float64, isBound bool) {
	for _, lb := range t.p.labels {
		name, value := plainText(t.p.labelName(lb)), plainText(t.p.labelText(lb))
		if string(name) == boundLabels[t.of.metricType] {
			v, err := strconv.ParseFloat(string(value), 64)
			if isBound = err == nil; isBound && without {
				bound = v
				continue
			} else if isBound && t.of.metricType != gaugeHistogram {
				value = appendBound(nil, value)
			}
		}
		if len(value) > 0 { // or it is no label
			dst = appendPair(dst, name, value)
		}
	}
	return dst, bound, isBound
}

// appendExemplar appends the exemplar that the sample may have. Prometheus stores its labels as they are written.
func (t *transcript) appendExemplar(dst []byte, number int) []byte {
	if len(t.p.exemplar) == 0 {
		return dst
	}
	p := parserOf(fmt.Appendf(nil, "e%s\n", t.p.exemplar[len("# "):]), t.from.format)
	if !p.next() { // it has a label twice
		return dst
	}
	var exemplar []byte
	for _, lb := range p.labels {
		exemplar = appendPair(exemplar, p.buf[lb.name:lb.nameEnd], p.labelText(lb))
	}
	exemplar = appendFloat(exemplar, 2, floatOf(p.valueText()))
	if len(p.stamp) > 0 {
		exemplar = appendTimestamp(exemplar, 3, millisOf(p.stamp))
	}
	return appendBytes(dst, number, exemplar)
}

// appendTimestamp appends a field with a time.
func appendTimestamp(dst []byte, number int, millis int64) []byte {
	rest := (millis%1000 + 1000) % 1000
	seconds := appendInteger(nil, 1, uint64((millis-rest)/1000))
	return appendBytes(dst, number, appendInteger(seconds, 2, uint64(rest)*1e6))
}

// plainText returns what a name or a label value stands for.
func plainText(text []byte) []byte {
	if bytes.IndexByte(text, '\\') < 0 {
		return text
	}
	return []byte(unescape.Replace(string(text)))
}

// ---- Status metrics

// ownMetrics are metrics of the program's own, as text that is read like any body.
type ownMetrics struct {
	text   []byte
	family string // the last one
}

// add adds a sample with the labels of pairs, one at least. All samples of a family are added one after another.
func (m *ownMetrics) add(name string, t metricType, help string, value float64, pairs ...string) {
	if name != m.family {
		m.text = fmt.Appendf(m.text, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, help, typeNames[t])
		m.family = name
	}
	open := byte('{')
	m.text = append(m.text, name...)
	for i := 0; i < len(pairs); i += 2 {
		m.text = append(append(append(m.text, open), pairs[i]...), `="`...)
		m.text = append(append(m.text, escape.Replace(strings.ToValidUTF8(pairs[i+1], "\uFFFD"))...), '"')
		open = ','
	}
	m.text = append(strconv.AppendFloat(append(m.text, "} "...), value, 'g', -1, 64), '\n')
}

// one adds a sample that tells of the program.
func (m *ownMetrics) one(name string, t metricType, help string, value float64, pairs ...string) {
	m.add(name, t, help, value, append(pairs, "exporter_name", ownName)...)
}

// read returns the metrics as an exposition. Sources may have the same series, unless telling.
func (m *ownMetrics) read(telling bool) *exposition {
	l := newLabeller(&exposition{buf: make([]byte, 0, 2*len(m.text)), telling: telling}, &addedLabels{})
	l.p = parserOf(m.text, format{})
	if err := l.readLines(nil, math.MaxInt32); err != nil {
		panic(err) // a fault in what is written above
	}
	return l.e
}

// sourceView is what a scrape sees of a source.
type sourceView struct {
	*source
	result *result
	status status
}

// addSources adds what is to be told of each source. A NaN is left out.
func (m *ownMetrics) addSources(sources []sourceView) {
	each := func(name string, t metricType, help string, value func(s sourceView) float64) {
		for _, s := range sources {
			if v := value(s); !math.IsNaN(v) {
				m.add(ownName+"_source_"+name, t, help, v, "exporter_name", s.name)
			}
		}
	}
	each("up", gauge, "Whether the source delivered for this scrape.",
		func(s sourceView) float64 { return oneIf(s.result.failure == nil) })
	each("scrape_duration_seconds", gauge, "How long the fetch took.", func(s sourceView) float64 {
		if s.result.start.IsZero() { // it missed the deadline
			return math.NaN()
		}
		return s.result.end.Sub(s.result.start).Seconds()
	})
	each("samples_scraped", gauge, "Samples that the source delivered.",
		func(s sourceView) float64 { return float64(s.result.samples()) })
	each("body_bytes", gauge, "Size of what the source delivered, decompressed.",
		func(s sourceView) float64 { return float64(s.result.bytes) })
	each("last_success_timestamp_seconds", gauge, "When the last fetch succeeded, 0 before the first.",
		func(s sourceView) float64 { return unixSeconds(s.status.lastSuccess) })
	each("timeout_seconds", gauge, "Longest time that a fetch may take.",
		func(s sourceView) float64 { return s.timeout.Seconds() })
	each("families_dropped", gauge, "Metric families that --drop left out.", func(s sourceView) float64 {
		if len(s.drop) == 0 {
			return math.NaN()
		}
		return float64(s.result.sum(func(e *exposition) int { return e.dropped }))
	})
	each("exit_status", gauge, "Exit status of the command.", func(s sourceView) float64 {
		if s.result.exit == nil {
			return math.NaN()
		}
		return float64(*s.result.exit)
	})
	each("fetches_total", counter, "Fetches that ended and were not abandoned by their scrapers.",
		func(s sourceView) float64 { return float64(s.status.fetches) })
	for _, s := range sources {
		for _, reason := range reasons[s.kind] {
			m.add(ownName+"_source_failures_total", counter, "Failed fetches, and scrapes that found the source busy.",
				float64(s.status.failures[reason]), "exporter_name", s.name, "reason", reason)
		}
	}
	for _, s := range sources {
		for _, f := range s.result.files {
			m.add(ownName+"_file_mtime_seconds", gauge, "When the file was last modified.",
				unixSeconds(f.mtime), "exporter_name", s.name, "file", f.name)
		}
	}
}

// addFindings adds what could not be merged as it came, by source: 0 for those that are not concerned.
func (m *ownMetrics) addFindings(sources []sourceView, found *findings) {
	each := func(name, help string, counts map[string]int) {
		tell := func(source string) {
			m.add(ownName+"_source_"+name, gauge, help, float64(counts[source]), "exporter_name", source)
		}
		for _, s := range sources {
			tell(s.name)
		}
		if counts[ownName] > 0 {
			tell(ownName)
		}
	}
	each("conflicting_families", "Metric families served untyped, as sources disagree on them.", found.conflicting)
	each("duplicate_samples_dropped", "Samples left out, as an earlier source has the same series.", found.repeated)
}

// about is what is to be told of the program.
type about struct {
	version    string
	revision   string
	linesLost  uint64          // of the log
	scrapes    map[int]uint64  // by status code
	reloads    map[string]bool // whether the last one was good, by flag
	certExpiry time.Time       // of its certificate, zero for none
	guarded    bool            // not everybody may ask
	refused    uint64          // requests
}

// addProgram adds what is to be told of the program.
func (m *ownMetrics) addProgram(a *about) {
	m.one(ownName+"_build_info", gauge, "The version of the program.", 1,
		"version", a.version, "revision", a.revision, "goversion", runtime.Version())
	m.one(ownName+"_log_lines_dropped_total", counter, "Lines of the log that could not be written.",
		float64(a.linesLost))
	for _, code := range slices.Sorted(maps.Keys(a.scrapes)) {
		m.add(ownName+"_scrapes_total", counter, "Scrapes that were answered before this one.",
			float64(a.scrapes[code]), "exporter_name", ownName, "code", strconv.Itoa(code))
	}
	for _, flag := range slices.Sorted(maps.Keys(a.reloads)) {
		m.add(ownName+"_last_reload_successful", gauge,
			"Whether the files that the flag names could be taken up when they last changed.",
			oneIf(a.reloads[flag]), "exporter_name", ownName, "flag", flag)
	}
	if !a.certExpiry.IsZero() {
		m.one(ownName+"_tls_certificate_expiry_timestamp_seconds", gauge,
			"When the certificate of the program expires.", unixSeconds(a.certExpiry))
	}
	if a.guarded {
		m.one(ownName+"_requests_refused_total", counter, "Requests without a right password or client certificate.",
			float64(a.refused))
	}
}

// readProcess reads the metrics of the process, but for those that the system does not tell (without /proc).
func readProcess(started time.Time) *exposition {
	m := &ownMetrics{}
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
	return m.read(true)
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
	slack int           // see boundGarbage; 0 before the first page
	turn  turn          // to render and to compress, which take much memory
	freed chan struct{} // has room for one who tells that a page was closed

	mu    sync.Mutex    // guards alive, and the readers and the compressed form of each page
	alive []*sharedPage // in the order they were made

	chunks sync.Pool    // of *chunk
	zipper *gzip.Writer // for the one who has the turn: to make one takes 1.2 MB
}

// maxPages is how many pages may be alive at once, and maxPageBytes how large they may be together when another is
// made. If need be, the readers of one are cut off, unless one of them has made progress within readTime.
const maxPages, maxPageBytes, readTime = 8, 128 << 20, 500 * time.Millisecond

// pageRequest is what a scraper wants.
type pageRequest struct {
	client  string // see clientOf
	came    time.Time
	sources []*source
	tickets []*ticket // one for each source
	takes   accept
	gzip    bool // it takes the page compressed
	program *about
	process *exposition // the metrics of the process
}

// newest returns the newest results of the sources.
func (want *pageRequest) newest() (results []*result) {
	for _, t := range want.tickets {
		results = append(results, t.result())
	}
	return results
}

// form returns the form that the scraper gets a page of these results in. Without a body in
// OpenMetrics, nor a name that needs quotes, it is text 0.0.4, unless it is protobuf.
func (want *pageRequest) form(results []*result) form {
	f := form{format: want.takes.format, strict: want.takes.escaping == ""}
	f.openMetrics = f.openMetrics && !f.strict && slices.ContainsFunc(results, (*result).openMetrics)
	f.quoted = want.takes.escaping == "allow-utf-8" && slices.ContainsFunc(results, (*result).quoted)
	return f
}

// sharedPage is a page and those who read it.
type sharedPage struct {
	*page
	sources []*source
	results []*result
	zipped  *page           // compressed, nil until a scraper wants it
	readers map[string]int  // by client, those of none as well
	made    time.Time       // or some time before
	read    time.Time       // when one of them made progress
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
	sp := ps.join(want, false)
	if sp == nil {
		var err error
		if sp, err = ps.render(ctx, want); err != nil {
			return nil, err
		}
	}
	if want.gzip && sp.zipped == nil {
		if err := ps.zip(ctx, sp); err != nil {
			ps.close(sp, want.client)
			return nil, err
		}
	}
	return sp, nil
}

// join adds a reader to the page alive that would be the same, and returns it. It returns
// nil if there is none, or none compressed if it has to be.
func (ps *pages) join(want *pageRequest, zipped bool) *sharedPage {
	results := want.newest()
	f := want.form(results)
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, sp := range ps.alive {
		same := sp.form == f && slices.Equal(sp.sources, want.sources) && slices.Equal(sp.results, results)
		current := !sp.made.Before(want.came) || time.Since(sp.made) < time.Second // its status metrics are
		if same && current && (sp.zipped != nil || !zipped) {
			sp.readers[want.client]++
			return sp
		}
	}
	return nil
}

// render renders a page once there is room: it waits readTime at most, as others wait for the turn.
func (ps *pages) render(ctx context.Context, want *pageRequest) (*sharedPage, error) {
	begin := time.Now()
	for wait := ps.cutOne(want.client, begin); wait > 0; wait = ps.cutOne(want.client, begin) {
		select {
		case <-ps.freed:
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	made, results := time.Now(), want.newest()
	ps.boundGarbage()
	pg, err := want.write(ctx, results, &ps.chunks)
	if err != nil {
		return nil, err
	}
	sp := &sharedPage{page: pg, sources: want.sources, results: results, made: made, read: time.Now()}
	sp.readers = map[string]int{want.client: 1}
	sp.ctx, sp.cut = context.WithCancel(context.Background())
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.alive = append(ps.alive, sp)
	return sp, nil
}

// write merges results with the status metrics that tell of them and those of the process. It fails if ctx ends.
func (want *pageRequest) write(ctx context.Context, results []*result, pool *sync.Pool) (*page, error) {
	f := want.form(results)
	var views []sourceView
	for i, s := range want.sources {
		views = append(views, sourceView{s, results[i], s.snapshot()})
	}
	own := &ownMetrics{}
	own.addSources(views)
	own.addProgram(want.program)
	written := len(own.text)
	own.addFindings(views, &findings{})
	status := own.read(false).as(f)
	bodies, names := [][]*exposition{status, want.process.as(f)}, []string{ownName, ownName}
	for i, r := range results {
		for _, e := range r.bodies {
			if err := ctx.Err(); err != nil { // samples may have to be written anew
				return nil, err
			}
			bodies = append(bodies, e.as(f))
			names = append(names, want.sources[i].name)
		}
	}
	m, err := merge(ctx, bodies, names, f)
	if err != nil {
		return nil, err
	}
	if len(m.pairs) > 0 {
		own.text = own.text[:written]
		own.addFindings(views, m.findings)
		m.renew(status[0], own.read(false).as(f)[0])
	}
	return m.write(ctx, pool)
}

// boundGarbage sets how much garbage there may be, in percent of live memory: as much as 24 MiB are of it, within
// bounds. Of little memory, 200 % instead of 100 % saves an appliance a tenth of the CPU time and costs 3 MiB. Much
// memory is in large bodies, which have no pointers: to collect it often is cheap.
func (ps *pages) boundGarbage() {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}} // at the last collection
	metrics.Read(live)
	slack := int(max(30, min(24<<20*100/max(live[0].Value.Uint64(), 1), 200)))
	if os.Getenv("GOGC") == "" && (ps.slack == 0 || slack < ps.slack) {
		ps.slack = slack
		debug.SetGCPercent(slack)
	}
}

// cutOne cuts off the readers of a page if there is no room for another one: a page of the client that reads
// most pages, the one of these that has not been read for longest. If that one was read within readTime, and the
// new reader has no fewer pages and has not waited for so long since begin, it returns how long that is to wait.
func (ps *pages) cutOne(client string, begin time.Time) (wait time.Duration) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	size := 0
	held := map[string]int{} // pages by client
	for _, sp := range ps.alive {
		size += sp.size
		for client := range sp.readers {
			held[client]++
		}
	}
	if len(ps.alive) < maxPages && size <= maxPageBytes {
		return 0
	}
	least := func(sp *sharedPage) int { // that one of its readers has
		n := maxPages
		for client := range sp.readers {
			n = min(n, held[client])
		}
		return n
	}
	first := slices.MinFunc(ps.alive, func(a, b *sharedPage) int {
		return cmp.Or(cmp.Compare(least(b), least(a)), a.read.Compare(b.read))
	})
	wait = readTime - max(time.Since(first.read), time.Since(begin))
	if wait <= 0 || least(first) > held[client]+1 {
		wait = 0
		first.cut()
		ps.alive = slices.DeleteFunc(ps.alive, func(sp *sharedPage) bool { return sp == first })
	}
	return wait
}

// progress notes that a reader of the page has taken some of it.
func (ps *pages) progress(sp *sharedPage) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	sp.read = time.Now()
}

// close takes a reader off a page, which is dropped with its last.
func (ps *pages) close(sp *sharedPage, client string) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if sp.readers[client]--; sp.readers[client] == 0 {
		delete(sp.readers, client)
	}
	if len(sp.readers) > 0 {
		return
	}
	sp.cut()
	ps.alive = slices.DeleteFunc(ps.alive, func(other *sharedPage) bool { return other == sp })
	sp.free()
	if sp.zipped != nil {
		sp.zipped.free()
	}
	select {
	case ps.freed <- struct{}{}:
	default:
	}
}

// zip compresses a page. It fails if ctx ends.
func (ps *pages) zip(ctx context.Context, sp *sharedPage) error {
	if ps.zipper == nil {
		ps.zipper, _ = gzip.NewWriterLevel(nil, gzip.BestSpeed)
	}
	zipped := &page{pool: &ps.chunks}
	ps.zipper.Reset(zipped)
	defer ps.zipper.Reset(nil) // or it would hold the page
	for _, chunk := range sp.chunks {
		if err := ctx.Err(); err != nil {
			return err
		}
		ps.zipper.Write(chunk)
	}
	ps.zipper.Close()
	zipped.flush()
	ps.mu.Lock()
	defer ps.mu.Unlock()
	sp.zipped = zipped
	sp.read = time.Now() // who waited for it begins to read now
	return nil
}
