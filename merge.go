// This file turns results into a page that scrapers share.
//
// A labeller reads one body, adds the labels of its source to the samples, and sorts
// them by metric family into an exposition, which never changes again. merge puts any
// number of expositions on one page. It moves families and refers to their lines as
// ranges of bytes: its work grows with the number of families, not of samples.

package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math"
	"math/bits"
	"os"
	"runtime"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// ---- Labelling

// Failures of a body that is longer than --max-bytes, and of one that would take more
// than four times that in memory.
var (
	errTooLarge = errors.New("larger than --max-bytes allows")
	errTooMuch  = fmt.Errorf("so many metric families or so much in added labels that it would take "+
		"four times --max-bytes in memory: %w", errTooLarge)
)

// addedLabels are what a source adds to each of its samples.
type addedLabels struct {
	names   []string
	text    []byte // as it stands between the braces
	seen    uint64 // see nameBit
	telling bool   // they tell its series from those of all other bodies
}

// add appends a label.
func (a *addedLabels) add(name, value string) {
	if len(a.names) > 0 {
		a.text = append(a.text, ',')
	}
	a.names = append(a.names, name)
	a.text = fmt.Appendf(a.text, `%s="%s"`, name, escape.Replace(value))
	a.seen |= nameBit([]byte(name))
}

// has reports whether a label of that name is added.
func (a *addedLabels) has(name []byte) bool {
	return slices.ContainsFunc(a.names, func(added string) bool { return added == string(name) })
}

// workspace is the memory that a body is read with. Once that is done, what is left in
// it can be used to read another.
type workspace struct {
	window []byte // of the parser
	body   []byte // of the exposition

	// more returns a larger limit for an exposition that is to take so many bytes, or the
	// old one if there is no more to be had. Nil if the limit is fixed.
	more func(wanted, limit int) int
}

// labelBody reads a whole body, of the text format or OpenMetrics, into an exposition
// that takes no more than limit bytes.
func labelBody(
	src io.Reader, openMetrics bool, added *addedLabels, w *workspace, limit int,
) (*exposition, error) {
	l := labeller{
		p:     parser{window: window{src: src, buf: w.window[:0]}, openMetrics: openMetrics},
		e:     &exposition{buf: w.body[:0], telling: added.telling},
		added: added,
		more:  w.more,
	}
	err := l.readLines(limit)
	w.window, w.body = nil, l.e.buf
	if cap(l.p.buf) <= 2*windowSize { // a long line makes it larger, and is rare
		w.window = l.p.buf
	}
	switch {
	case err != nil:
		return nil, err
	case len(l.e.buf) < cap(l.e.buf)/4: // as it is, a thousand small files would hold a thousand large buffers
		l.e.buf = slices.Clone(l.e.buf)
	default:
		w.body = nil // it is the exposition's now
	}
	return l.e, nil
}

// labeller makes the exposition of one body.
type labeller struct {
	p        parser
	e        *exposition
	added    *addedLabels
	more     func(wanted, limit int) int // see workspace
	prefix   []byte                      // what samples of this name begin with: name, brace and added labels
	exported [][]byte                    // new names of the sample's labels that give way to added ones
	bare     map[string]string           // the sample's label names that need quotes, without; nil to keep quotes
}

// readLines reads the body to its end and brings its families into order. It fails if
// more than limit bytes would have to be held.
func (l *labeller) readLines(limit int) error {
	for l.p.next() {
		switch l.p.kind {
		case sampleLine:
			l.sample()
		case helpLine:
			l.keepHelp()
		case typeLine:
			l.keepType()
		}
		if held := l.e.held(); held > limit {
			if l.more != nil {
				limit = l.more(held, limit)
			}
			if held > limit {
				return errTooMuch
			}
		}
		if size := len(l.e.buf); cap(l.e.buf)-size < 1<<10 { // append would leave four times as much garbage
			l.e.buf = slices.Grow(l.e.buf, max(min(size, limit-size), 0)+2<<10)
		}
	}
	if l.p.err != nil {
		return l.p.err
	}
	if wanted := len(l.e.buf) + l.e.held(); wanted > limit && l.more != nil {
		limit = l.more(wanted, limit)
	}
	return l.e.regroup(limit)
}

// sample appends a sample with its added labels to its family.
func (l *labeller) sample() {
	if !l.p.repeated {
		l.enter()
	}
	if l.p.plain && l.p.seen()&l.added.seen == 0 {
		l.relay()
	} else {
		l.relabel()
	}
	f := l.last()
	f.lines.to = uint32(len(l.e.buf))
	l.e.samples++
	if l.p.seen()&boundNames != 0 || l.p.valueText()[0] == '-' {
		f.contradict(&l.p)
	}
}

// enter makes the family of the sample's name the last one.
func (l *labeller) enter() {
	if f := l.last(); f == nil || !f.covers(l.e.text(f.name), l.p.name) {
		if !l.rename() {
			l.begin()
		}
	}
	l.prefix = append(append(l.prefix[:0], l.p.name...), '{')
	if len(l.added.text) > 0 {
		l.prefix = append(append(l.prefix, l.added.text...), ',')
	}
}

// boundNames are the bits of the labels that bound a bucket or a quantile.
var boundNames = nameBit([]byte("le")) | nameBit([]byte("quantile"))

// contradict notes which types the sample speaks against: the strictest parsers refuse
// a bound that is not a number, and a bucket or count below zero.
func (f *family) contradict(p *parser) {
	bucket := false
	for i := len(p.labels) - 1; i >= 0 && p.labels[i].seen&boundNames != 0; i-- {
		l := &p.labels[i]
		switch string(p.labelName(*l)) {
		case "le":
			bucket = true
			f.noHistogram = f.noHistogram || !isNumber(p.labelText(*l))
		case "quantile":
			f.noSummary = f.noSummary || !isNumber(p.labelText(*l))
		}
	}
	if p.valueText()[0] == '-' && (bucket || bytes.HasSuffix(p.name, []byte("_count"))) {
		value, _ := strconv.ParseFloat(string(p.valueText()), 64)
		f.noHistogram = f.noHistogram || value < 0
	}
}

// rename makes a family of OpenMetrics that has no samples yet the last one, under the
// name of this sample, if that is its name in the text format: foo_total for the counter
// foo, foo_info for the info foo, which is a gauge here. One other family, foo_created,
// may stand between.
func (l *labeller) rename() bool {
	n := len(l.e.families)
	for i := n - 1; i >= max(0, n-2) && l.p.openMetrics; i-- {
		f := l.e.families[i]
		suffix, ok := bytes.CutPrefix(l.p.name, l.e.text(f.name))
		isTotal := f.metricType == counter && string(suffix) == "_total"
		isInfo := f.metricType == gauge && string(suffix) == "_info"
		if ok && (isTotal || isInfo) && f.lines.from == f.lines.to {
			f.name = l.e.add(l.p.name)
			f.lines = span{f.name.to, f.name.to}
			l.e.families = append(slices.Delete(l.e.families, i, i+1), f)
			return true
		}
	}
	return false
}

// relay appends a plain sample as it came, after its name and the added labels.
func (l *labeller) relay() {
	out := append(l.e.buf, l.prefix...)
	if len(l.p.labels) == 0 {
		out = out[:len(out)-1]
		if len(l.added.text) > 0 {
			out = append(out, '}')
		}
	}
	l.e.buf = append(out, l.p.tail()...)
}

// relabel appends a sample that has to be written anew: it is not plain, or one of its
// labels gives way to an added one.
func (l *labeller) relabel() {
	out, open := l.appendName(l.e.buf), byte('{')
	if len(out) > len(l.e.buf)+len(l.p.name) { // quoted, in braces
		open = ','
	}
	if len(l.added.text) > 0 {
		out = append(append(out, open), l.added.text...)
		open = ','
	}
	l.exported = l.exported[:0]
	if l.bare != nil {
		l.renameLabels()
	}
	for _, lb := range l.p.labels {
		out = l.appendLabel(append(out, open), lb)
		open = ','
	}
	if open == ',' {
		out = append(out, '}')
	}
	out = append(append(out, ' '), l.p.valueText()...)
	if len(l.p.stamp) > 0 {
		out = append(append(out, ' '), l.p.stamp...)
	}
	l.e.buf = append(out, '\n')
}

// appendName appends the name of the sample, after a brace if it needs quotes.
func (l *labeller) appendName(dst []byte) []byte {
	if isBareName(l.p.name) {
		return append(dst, l.p.name...)
	}
	return append(append(append(dst, `{"`...), l.p.name...), '"')
}

// appendLabel appends a label of the sample, under another name if its own is an added
// label's, or needs quotes that this exposition does without.
func (l *labeller) appendLabel(dst []byte, lb label) []byte {
	name := l.p.labelName(lb)
	if l.added.has(name) {
		name = l.exportedName(name)
	}
	if bare, ok := l.bare[string(name)]; ok {
		name = []byte(bare)
	}
	if isBareLabel(name) {
		dst = append(dst, name...)
	} else {
		dst = append(append(append(dst, '"'), name...), '"')
		l.last().quoted = true
	}
	dst = append(dst, `="`...)
	return append(appendRespelled(dst, l.p.labelText(lb), `\"n`), '"')
}

// exportedName returns the name under which a label of the sample gives way to an added
// one: as in Prometheus, with exported_ before it until no other label has it.
func (l *labeller) exportedName(name []byte) []byte {
	n := len(l.exported)
	l.exported = slices.Grow(l.exported, 1)[:n+1]
	free := append(l.exported[n][:0], name...)
	same := func(name []byte) bool { return bytes.Equal(name, free) }
	for l.added.has(free) || slices.ContainsFunc(l.exported[:n], same) || l.p.hasLabel(free) {
		free = slices.Insert(free, 0, []byte("exported_")...)
	}
	l.exported[n] = free
	return free
}

// renameLabels finds a name without quotes for each label of the sample that needs some.
// Labels that would get the same name are numbered in the order of the names they have:
// a series stays the same series when an exporter writes its labels in another order.
func (l *labeller) renameLabels() {
	clear(l.bare)
	used := map[string]int{} // by name, the last number tried
	for _, lb := range l.p.labels {
		if name := l.p.labelName(lb); isBareLabel(name) {
			used[string(name)] = 1
		}
	}
	for _, lb := range l.p.byName() {
		name := l.p.labelName(lb)
		if isBareLabel(name) {
			continue
		}
		wanted := strings.ReplaceAll(string(underscores(name)), ":", "_")
		free := wanted
		for used[free] > 0 {
			used[wanted]++
			free = wanted + "_" + strconv.Itoa(used[wanted])
		}
		used[free] = 1
		l.bare[string(name)] = free
	}
}

// underscores returns a name with an underscore for each character that needs quotes:
// what Prometheus calls escaping=underscores.
func underscores(name []byte) []byte {
	if isBareName(name) {
		return name
	}
	var out []byte
	for i, c := range unescape.Replace(string(name)) {
		if c >= utf8.RuneSelf || class[c]&nameByte == 0 || i == 0 && class[c]&digit != 0 {
			c = '_'
		}
		out = append(out, byte(c))
	}
	return out
}

// keepHelp keeps the HELP text of a family, if it is the first.
func (l *labeller) keepHelp() {
	f := l.last()
	if f == nil || !bytes.Equal(l.e.text(f.name), l.p.name) || f.lines.from < f.lines.to {
		f = l.begin()
	}
	if f.help.from == f.help.to {
		text := bytes.TrimRight(l.p.text, "\r") // or it would be taken for a part of the line's end
		if l.p.openMetrics {
			text = []byte(unquoteHelp.Replace(string(text)))
		}
		f.help.from = uint32(len(l.e.buf))
		l.e.buf = appendRespelled(l.e.buf, text, `\n`)
		f.help.to = uint32(len(l.e.buf))
		f.lines = span{f.help.to, f.help.to}
	}
}

// escape turns a text into what stands for it in a label value.
var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// unescape turns a label value or a quoted name into what it stands for.
var unescape = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\n`, "\n")

// unquoteHelp removes the escape of quotes, which the text format does not have in HELP.
var unquoteHelp = strings.NewReplacer(`\\`, `\\`, `\"`, `"`)

// keepType keeps the type of a family. Untyped is no opinion; two opinions make two
// families, which regroup joins.
func (l *labeller) keepType() {
	f := l.last()
	differs := f != nil && f.metricType != untyped && l.p.metricType != untyped && f.metricType != l.p.metricType
	if f == nil || differs || !bytes.Equal(l.e.text(f.name), l.p.name) {
		f = l.begin()
	}
	if l.p.metricType != untyped {
		f.metricType = l.p.metricType
	}
}

// last returns the family of the last line, nil before the first.
func (l *labeller) last() *family {
	if n := len(l.e.families); n > 0 {
		return &l.e.families[n-1]
	}
	return nil
}

// begin begins a family of the name that the parser stands at.
func (l *labeller) begin() *family {
	name := l.e.add(l.p.name)
	none := span{name.to, name.to}
	l.e.families = append(l.e.families, family{name: name, help: none, lines: none, quoted: !isBareName(l.p.name)})
	return l.last()
}

// appendRespelled appends a text as it stands in a body: newlines are escaped, and a
// backslash is doubled unless one of escapes follows it.
func appendRespelled(dst, text []byte, escapes string) []byte {
	if bytes.IndexByte(text, '\\') < 0 && bytes.IndexByte(text, '\n') < 0 {
		return append(dst, text...)
	}
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '\n':
			dst = append(dst, `\n`...)
		case c == '\\' && i+1 < len(text) && strings.IndexByte(escapes, text[i+1]) >= 0:
			i++
			dst = append(dst, c, text[i])
		case c == '\\':
			dst = append(dst, `\\`...)
		default:
			dst = append(dst, c)
		}
	}
	return dst
}

// ---- One exposition

// exposition is one body with its labels added and its families in the order of their
// names. It never changes, so that scrapes can share it.
type exposition struct {
	buf      []byte // names, HELP texts and lines of the families
	families []family
	samples  int
	telling  bool // its labels tell its series from those of all other bodies
	quoted   bool // a name in it needs quotes
}

// text returns a range of the exposition.
func (e *exposition) text(s span) []byte { return e.buf[s.from:s.to] }

// add appends text to the buffer.
func (e *exposition) add(text []byte) span {
	from := uint32(len(e.buf))
	e.buf = append(e.buf, text...)
	return span{from, uint32(len(e.buf))}
}

// held is the memory that the exposition and a page made of it take, in bytes.
func (e *exposition) held() int { return len(e.buf) + len(e.families)*familySize }

// familySize is the memory that a family takes, in bytes: 28 here, as much again while
// their slice grows, and 72 while it is merged.
const familySize = 128

// span is a range of an exposition's buf.
type span struct{ from, to uint32 }

// family is what one body has of one metric family.
type family struct {
	name, help span // escaped as in the format
	lines      span
	metricType metricType
	quoted     bool // the family's name or one in its lines needs quotes

	noHistogram, noSummary bool // a sample contradicts that type, see contradict
}

// covers reports whether samples of a name belong to the family.
func (f *family) covers(family, sample []byte) bool {
	suffix, ok := bytes.CutPrefix(sample, family)
	return ok && (len(suffix) == 0 || f.metricType.claims(string(suffix)))
}

// claims reports whether a family of the type has samples whose name is the
// family's with that suffix.
func (t metricType) claims(suffix string) bool {
	switch suffix {
	case "_bucket":
		return t == histogram
	case "_sum", "_count":
		return t == histogram || t == summary
	}
	return false
}

// regroup brings the families into order. If the body scattered a family over several
// places, or typed one after its samples, it writes the buffer anew, which fails if both
// buffers take more than limit bytes.
func (e *exposition) regroup(limit int) error {
	e.sort()
	e.quoted = slices.ContainsFunc(e.families, func(f family) bool { return f.quoted })
	if e.isGrouped() {
		return nil
	}
	if len(e.buf)+e.held() > limit {
		return errTooMuch
	}
	e.adopt()
	whole := exposition{buf: make([]byte, 0, len(e.buf))}
	for _, g := range groupsOf(e.groups(0)) {
		whole.join(g)
	}
	e.buf, e.families = whole.buf, whole.families
	return nil
}

// sort sorts the families by name, and those of one name as they came.
func (e *exposition) sort() {
	slices.SortFunc(e.families, func(a, b family) int {
		return cmp.Or(bytes.Compare(e.text(a.name), e.text(b.name)), cmp.Compare(a.lines.from, b.lines.from))
	})
}

// isGrouped reports whether each family has lines, and is there once.
func (e *exposition) isGrouped() bool {
	for i, f := range e.families {
		if f.lines.from == f.lines.to || i > 0 && bytes.Equal(e.text(e.families[i-1].name), e.text(f.name)) {
			return false
		}
	}
	return true
}

// adopt makes untyped families that a histogram or summary of the body claims pieces of
// that.
func (e *exposition) adopt() {
	groups := groupsOf(e.groups(0))
	var found []*family
	for _, g := range groups {
		for _, i := range claimedBy(groups, g, g.types()) {
			for p := groups[i].first; p != nil; p = p.next {
				if p.metricType == untyped {
					found = append(found, p.family)
				}
			}
		}
	}
	for _, f := range found {
		f.fold(e)
	}
}

// fold gives a family the name of the one that claims it.
func (f *family) fold(e *exposition) {
	f.name.to = f.name.from + uint32(bytes.LastIndexByte(e.text(f.name), '_'))
	f.help.to = f.help.from // it says what h_count is, not what h is
}

// join appends one family of another exposition: the first HELP text, the type, and all
// lines. Without lines there is no family.
func (e *exposition) join(g group) {
	whole := family{name: e.add(g.name()), metricType: g.types().agreed()}
	for p := g.first; p != nil; p = p.next {
		if whole.help.from == whole.help.to {
			whole.help = e.add(p.text(p.help))
		}
		whole.quoted = whole.quoted || p.quoted
		whole.noHistogram = whole.noHistogram || p.noHistogram
		whole.noSummary = whole.noSummary || p.noSummary
	}
	whole.lines.from = uint32(len(e.buf))
	for p := g.first; p != nil; p = p.next {
		e.add(p.text(p.run))
	}
	if whole.lines.to = uint32(len(e.buf)); whole.lines.from < whole.lines.to {
		e.families = append(e.families, whole)
	}
}

// typeSet has a bit for each type that was given to one family.
type typeSet uint8

// agreed returns the one type in the set beside untyped, which is no opinion.
func (ts typeSet) agreed() metricType {
	ts &^= 1 << untyped
	switch bits.OnesCount8(uint8(ts)) {
	case 0:
		return untyped
	case 1:
		return metricType(bits.TrailingZeros8(uint8(ts)))
	}
	return conflicting
}

// unquoted returns the exposition for scrapers that do not know quoted names: the
// families without any as they are, and the others with underscores.
func (e *exposition) unquoted() []*exposition {
	if !e.quoted {
		return []*exposition{e}
	}
	rest := &exposition{buf: e.buf, telling: e.telling}
	l := labeller{e: &exposition{telling: e.telling}, added: &addedLabels{}, bare: map[string]string{}}
	for _, f := range e.families {
		if f.quoted {
			l.rewrite(e, f)
		} else {
			rest.families = append(rest.families, f)
		}
	}
	l.e.regroup(math.MaxInt)
	return []*exposition{rest, l.e}
}

// rewrite adds a family of another exposition, with underscores for what needs quotes.
func (l *labeller) rewrite(from *exposition, f family) {
	l.p = parserOf(from.text(f.lines))
	l.p.name = underscores(from.text(f.name))
	l.begin().metricType = f.metricType
	l.p.text = from.text(f.help)
	l.keepHelp()
	for l.p.next() {
		l.p.name = underscores(l.p.name) // the parser sets the name anew unless it is bare and repeated
		l.sample()
	}
}

// ---- Merging

// merged is what is to be on a page: metric families in the order of their names.
type merged struct {
	groups []group
	findings
}

// findings are what could not be merged as it came.
type findings struct {
	conflicts  []string // families served untyped, in order
	duplicates int      // samples left out because an earlier body has the series
	repeating  []string // families that those were of, in order
}

// part is what one body has of a family: all its lines, or a run of them.
type part struct {
	body *exposition
	*family
	run  span
	rank int32 // of the body, in the order of the flags
	next *part // of the same family
}

// text returns a range of the part's body.
func (p *part) text(s span) []byte { return p.body.text(s) }

// group is all parts of one family on the page, by body.
type group struct{ first, last *part }

// groupOf returns a group of one part.
func groupOf(body *exposition, f *family, run span, rank int32) group {
	p := &part{body: body, family: f, run: run, rank: rank}
	return group{p, p}
}

// merge merges bodies. Each is one exposition, or two if some of its families had to be
// written anew. It fails if ctx ends.
func merge(ctx context.Context, bodies [][]*exposition) (*merged, error) {
	groups := gather(bodies, 0)
	m := &merged{}
	m.groups, m.conflicts = settle(groups, judge(groups))
	return m, m.dropRepeats(ctx)
}

// gather lists the families of bodies by name. Those of each body are in order, so all
// that takes is merging lists.
func gather(bodies [][]*exposition, rank int32) []group {
	if half := len(bodies) / 2; half > 0 {
		return mergeGroups(gather(bodies[:half], rank), gather(bodies[half:], rank+int32(half)))
	}
	var groups []group
	for _, body := range bodies { // there is one at most
		for _, e := range body {
			groups = mergeGroups(groups, e.groups(rank))
		}
	}
	return groups
}

// groups lists the families of an exposition, or their pieces until it is grouped.
func (e *exposition) groups(rank int32) []group {
	parts := make([]part, len(e.families))
	groups := make([]group, len(e.families))
	for i := range parts {
		f := &e.families[i]
		parts[i] = part{body: e, family: f, run: f.lines, rank: rank}
		groups[i] = group{&parts[i], &parts[i]}
	}
	return groups
}

// mergeGroups merges two lists that are in order.
func mergeGroups(a, b []group) []group {
	switch {
	case len(a) == 0:
		return b
	case len(b) == 0:
		return a
	}
	all := make([]group, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		switch order := bytes.Compare(a[0].name(), b[0].name()); {
		case order < 0:
			all, a = append(all, a[0]), a[1:]
		case order > 0:
			all, b = append(all, b[0]), b[1:]
		default:
			a[0].join(b[0])
			all, a, b = append(all, a[0]), a[1:], b[1:]
		}
	}
	return append(append(all, a...), b...)
}

// join adds the parts of another group, which mostly come after all of this.
func (g *group) join(other group) {
	if g.last.compare(other.first) <= 0 {
		g.last.next, g.last = other.first, other.last
		return
	}
	var both group
	for a, b := g.first, other.first; a != nil || b != nil; {
		if b == nil || a != nil && a.compare(b) <= 0 {
			a = both.add(a)
		} else {
			b = both.add(b)
		}
	}
	*g = both
}

// compare says which of two parts of one family comes first: by body, then as they came.
func (p *part) compare(other *part) int {
	if p.body != other.body {
		return cmp.Compare(p.rank, other.rank)
	}
	return cmp.Compare(p.run.from, other.run.from)
}

// add adds a part and returns the one that followed it where it was.
func (g *group) add(p *part) (next *part) {
	if g.last == nil {
		g.first = p
	} else {
		g.last.next = p
	}
	g.last, next, p.next = p, p.next, nil
	return next
}

// name returns the name of the family.
func (g group) name() []byte { return g.first.text(g.first.name) }

// types returns the types that the parts have.
func (g group) types() typeSet {
	var types typeSet
	for p := g.first; p != nil; p = p.next {
		types |= 1 << p.metricType
	}
	return types
}

// contradicts reports whether a sample of the group speaks against the type.
func (g group) contradicts(t metricType) bool {
	found := false
	for p := g.first; p != nil; p = p.next {
		found = found || t == histogram && p.noHistogram || t == summary && p.noSummary
	}
	return found
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
	toSplit         // into untyped families, one for each sample name
	toFold          // into the histogram or summary that claims the name
)

// judge returns a verdict on each group. A family is split if its types differ, if it
// has samples that its type does not allow, or if it is a histogram or summary that
// claims the name of a family with another type, which is split, too. One without a type
// whose name is claimed is folded.
func judge(groups []group) []verdict {
	verdicts := make([]verdict, len(groups))
	for i, g := range groups {
		types := g.types()
		t := types.agreed()
		if t == conflicting || g.contradicts(t) {
			verdicts[i] = toSplit
		}
		claimed := claimedBy(groups, g, types)
		for _, c := range claimed {
			if groups[c].types().agreed() != untyped || groups[c].contradicts(t) {
				verdicts[i] = toSplit
			}
		}
		for _, c := range claimed {
			if groups[c].types().agreed() != untyped {
				verdicts[c] = toSplit
			} else if verdicts[i] != toSplit {
				verdicts[c] = toFold
			}
		}
	}
	return verdicts
}

// claimedBy lists the groups whose names a histogram or summary in g claims.
func claimedBy(groups []group, g group, types typeSet) []int {
	if types&(1<<histogram|1<<summary) == 0 {
		return nil
	}
	var claimed []int
	for _, suffix := range []string{"_bucket", "_count", "_sum"} {
		if types&(1<<histogram) == 0 && !summary.claims(suffix) {
			continue
		}
		if i, found := find(groups, append(slices.Clone(g.name()), suffix...)); found {
			claimed = append(claimed, i)
		}
	}
	return claimed
}

// settle carries out the verdicts. It returns the names of the families that are split,
// too: they are in conflict.
func settle(groups []group, verdicts []verdict) (settled []group, conflicts []string) {
	rest := groups[:0]
	var changed []group
	for i, g := range groups {
		switch verdicts[i] {
		case toSplit:
			conflicts = append(conflicts, string(g.name()))
			for p := g.first; p != nil; p = p.next {
				changed = p.appendSplit(changed)
			}
		case toFold:
			for p := g.first; p != nil; p = p.next {
				folded := *p.family
				folded.fold(p.body)
				changed = append(changed, groupOf(p.body, &folded, p.run, p.rank))
			}
		default:
			rest = append(rest, g)
		}
	}
	return mergeGroups(rest, groupsOf(changed)), conflicts
}

// groupsOf sorts groups and joins those of one family.
func groupsOf(pieces []group) []group {
	slices.SortFunc(pieces, func(a, b group) int {
		return cmp.Or(bytes.Compare(a.name(), b.name()), a.first.compare(b.first))
	})
	groups := pieces[:0]
	for _, g := range pieces {
		if n := len(groups); n > 0 && bytes.Equal(groups[n-1].name(), g.name()) {
			groups[n-1].join(g)
		} else {
			groups = append(groups, g)
		}
	}
	return groups
}

// appendSplit appends the lines of a part as untyped families, one for each sample name,
// of which there are four at most.
func (p *part) appendSplit(dst []group) []group {
	if p.metricType != conflicting && !p.metricType.claims("_sum") { // all its samples have the family's name
		f := *p.family
		f.metricType = conflicting
		return append(dst, groupOf(p.body, &f, p.run, p.rank))
	}
	before := len(dst)
	for at := p.run.from; at < p.run.to; {
		name := p.body.sampleName(at)
		run := span{at, at + uint32(bytes.IndexByte(p.body.buf[at:], '\n')) + 1}
		i := before + slices.IndexFunc(dst[before:], func(g group) bool { return bytes.Equal(g.name(), p.text(name)) })
		switch {
		case i < before:
			f := &family{name: name, metricType: conflicting, quoted: p.quoted}
			if bytes.Equal(p.text(name), p.text(p.name)) {
				f.help = p.help
			}
			dst = append(dst, groupOf(p.body, f, run, p.rank))
		case dst[i].last.run.to == at:
			dst[i].last.run.to = run.to
		default:
			dst[i].add(&part{body: p.body, family: dst[i].first.family, run: run, rank: p.rank})
		}
		at = run.to
	}
	return dst
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
			m.repeating = append(m.repeating, string(g.name()))
		}
	}
	return nil
}

// mayRepeat reports whether two bodies may have the same series in the family.
func (g group) mayRepeat() bool {
	untold := false
	for p := g.first; p != nil; p = p.next {
		untold = untold || !p.body.telling
	}
	return untold && g.first.rank != g.last.rank
}

// distinct returns a group without the samples whose series an earlier body has, and how
// many those are. What one body has twice stays. Series are told apart by 128 bits of
// keyed hash: two of a million have the same with a probability of 10⁻²⁷.
func (g group) distinct() (distinct group, repeats int) {
	first, second := maphash.MakeSeed(), maphash.MakeSeed()
	ranks := map[[2]uint64]int32{} // of the first body that has the series
	var series []byte
	for p := g.first; p != nil; p = p.next {
		rest := *p
		lines := parserOf(p.text(p.run))
		for lines.next() {
			series = lines.appendSeries(series[:0])
			hash := [2]uint64{maphash.Bytes(first, series), maphash.Bytes(second, series)}
			if rank, found := ranks[hash]; !found {
				ranks[hash] = p.rank
			} else if rank != p.rank {
				kept := rest // even if it has no lines: it may have the HELP text or the type
				kept.run.to = p.run.from + uint32(lines.start)
				rest.run.from = p.run.from + uint32(lines.pos)
				distinct.add(&kept)
				repeats++
			}
		}
		distinct.add(&rest)
	}
	return distinct, repeats
}

// appendSeries appends the sample's name and its labels in the order of their names. An
// empty label is no label.
func (p *parser) appendSeries(dst []byte) []byte {
	dst = append(dst, p.name...)
	for _, l := range p.byName() {
		if value := p.labelText(l); len(value) > 0 {
			dst = append(append(dst, '"'), p.labelName(l)...)
			dst = append(append(dst, '"'), value...)
		}
	}
	return dst
}

// addOwn puts the program's own metrics on the page, after all others. Of a family that a
// source has too, the source's HELP text and type stay, and its samples where they are of
// the same series.
func (m *merged) addOwn(own ...[]*exposition) {
	n := len(m.groups)
	for _, g := range gather(own, math.MaxInt32-1) {
		at, found := find(m.groups[:n], g.name())
		if !found {
			m.groups = append(m.groups, g)
			continue
		}
		if m.groups[at].types().agreed() != untyped {
			yielding := *g.first.family
			yielding.metricType = untyped
			g.first.family = &yielding
		}
		m.groups[at].join(g)
		m.groups[at], _ = m.groups[at].distinct()
	}
}

// page is one valid exposition, ready to be written. It refers to long runs of lines
// where they are and holds the rest.
type page struct {
	chunks [][]byte
	size   int
	tail   []byte // the chunk being filled
	findings
}

// write writes the page. It fails if ctx ends.
func (m *merged) write(ctx context.Context) (*page, error) {
	pg := &page{findings: m.findings}
	for _, g := range m.groups {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		pg.addFamily(g)
	}
	pg.flush()
	return pg, nil
}

// addFamily adds one family: its HELP and TYPE lines and all its samples.
func (pg *page) addFamily(g group) {
	if cap(pg.tail)-len(pg.tail) < 1<<10 {
		pg.flush()
		pg.tail = make([]byte, 0, 32<<10)
	}
	for p := g.first; p != nil; p = p.next {
		if p.help.from < p.help.to {
			pg.addMetadata("# HELP ", g, p.text(p.help))
			break
		}
	}
	pg.addMetadata("# TYPE ", g, []byte(typeNames[g.types().agreed()]))
	for p := g.first; p != nil; p = p.next {
		pg.addLines(p.text(p.run))
	}
}

// addMetadata adds a HELP or TYPE line.
func (pg *page) addMetadata(what string, g group, text []byte) {
	out, name := append(pg.tail, what...), g.name()
	if g.first.quoted && !isBareName(name) {
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

// render merges results with the status metrics that tell of them and with those of the
// process. It fails if ctx ends.
func (p *program) render(
	ctx context.Context, sources []*source, results []*result, quoted bool, process *exposition,
) (*page, error) {
	var bodies [][]*exposition
	for _, r := range results {
		for _, e := range r.bodies {
			if quoted {
				bodies = append(bodies, []*exposition{e})
			} else {
				bodies = append(bodies, e.unquoted())
			}
		}
	}
	m, err := merge(ctx, bodies)
	if err != nil {
		return nil, err
	}
	var status ownMetrics
	status.addSources(sources, results)
	status.addProgram(p, &m.findings)
	m.addOwn([]*exposition{status.finish()}, []*exposition{process})
	return m.write(ctx)
}

// report logs what could not be merged, once for each family. It may block as long as
// nobody reads the log, so the page has to be sent and closed before.
func (p *program) report(found *findings) {
	for _, name := range found.conflicts {
		p.warnOnce(name, "the types of a metric family are in conflict: served untyped", "family", name)
	}
	for _, name := range found.repeating {
		p.warnOnce(name, "sources without a telling label have the same series: the first is served", "family", name)
	}
}

// warnOnce logs a warning once for each subject, until it has logged a thousand.
func (p *program) warnOnce(subject, what string, attrs ...any) {
	p.warnedMu.Lock()
	known := p.warned[what+subject] || len(p.warned) == 1000
	if !known {
		p.warned[what+subject] = true
	}
	p.warnedMu.Unlock()
	if !known {
		p.log.Warn(what, attrs...)
	}
}

// ownMetrics makes an exposition of the program's own metrics.
type ownMetrics struct{ exposition }

// begin begins a metric family.
func (m *ownMetrics) begin(name string, t metricType, help string) {
	f := family{name: m.add([]byte(name)), help: m.add([]byte(help)), metricType: t}
	f.lines = span{f.help.to, f.help.to}
	m.families = append(m.families, f)
}

// sample adds a sample with the labels of pairs, one at least, to the family begun last.
func (m *ownMetrics) sample(value float64, pairs ...string) {
	f := &m.families[len(m.families)-1]
	open := byte('{')
	out := append(m.buf, m.text(f.name)...)
	for i := 0; i < len(pairs); i += 2 {
		out = append(append(append(out, open), pairs[i]...), `="`...)
		out = append(append(out, escape.Replace(strings.ToValidUTF8(pairs[i+1], "\uFFFD"))...), '"')
		open = ','
	}
	out = append(out, "} "...)
	m.buf = append(strconv.AppendFloat(out, value, 'g', -1, 64), '\n')
	f.lines.to = uint32(len(m.buf))
}

// one adds a family of one sample that tells of the program.
func (m *ownMetrics) one(name string, t metricType, help string, value float64, pairs ...string) {
	m.begin(name, t, help)
	m.sample(value, append(pairs, "exporter_name", ownName)...)
}

// finish returns the exposition, without families that have no samples.
func (m *ownMetrics) finish() *exposition {
	m.families = slices.DeleteFunc(m.families, func(f family) bool { return f.lines.from == f.lines.to })
	m.sort()
	return &m.exposition
}

// addSources adds what is to be told of each source.
func (m *ownMetrics) addSources(sources []*source, results []*result) {
	counted := make([]counts, len(sources))
	for i, s := range sources {
		counted[i] = s.status.snapshot()
	}
	each := func(name string, t metricType, help string, value func(i int) float64) {
		m.begin(ownName+"_source_"+name, t, help)
		for i, s := range sources {
			if v := value(i); !math.IsNaN(v) {
				m.sample(v, "exporter_name", s.name)
			}
		}
	}
	each("up", gauge, "Whether the source delivered for this scrape.",
		func(i int) float64 { return oneIf(results[i].failure == nil) })
	each("scrape_duration_seconds", gauge, "How long the fetch took.", func(i int) float64 {
		if results[i].start.IsZero() { // it missed the deadline
			return math.NaN()
		}
		return results[i].end.Sub(results[i].start).Seconds()
	})
	each("samples_scraped", gauge, "Samples that the source delivered.",
		func(i int) float64 { return float64(results[i].samples()) })
	each("body_bytes", gauge, "Size of what the source delivered, decompressed.",
		func(i int) float64 { return float64(results[i].bytes) })
	each("last_success_timestamp_seconds", gauge, "When the last fetch succeeded, 0 before the first.",
		func(i int) float64 { return unixSeconds(counted[i].lastSuccess) })
	each("timeout_seconds", gauge, "Longest time that a fetch may take.",
		func(i int) float64 { return sources[i].timeout.Seconds() })
	each("exit_status", gauge, "Exit status of the command.", func(i int) float64 {
		if exit := results[i].exit; exit.known {
			return float64(exit.code)
		}
		return math.NaN()
	})
	each("fetches_total", counter, "Fetches that ended and were not abandoned by their scrapers.",
		func(i int) float64 { return float64(counted[i].fetches) })
	m.begin(ownName+"_source_failures_total", counter, "Failed fetches, and scrapes that found the source busy.")
	for i, s := range sources {
		for _, reason := range reasons[s.kind] {
			m.sample(float64(counted[i].failures[reason]), "exporter_name", s.name, "reason", reason)
		}
	}
	m.begin(ownName+"_file_mtime_seconds", gauge, "When the file was last modified.")
	for i, s := range sources {
		for _, f := range results[i].files {
			m.sample(unixSeconds(f.mtime), "exporter_name", s.name, "file", f.name)
		}
	}
}

// addProgram adds what is to be told of the page and the program.
func (m *ownMetrics) addProgram(p *program, found *findings) {
	m.one(ownName+"_conflicting_families", gauge, "Metric families served untyped, as the sources disagree on them.",
		float64(len(found.conflicts)))
	m.one(ownName+"_duplicate_series_dropped", gauge, "Samples left out, as an earlier source has the same series.",
		float64(found.duplicates))
	m.one(ownName+"_build_info", gauge, "The version of the program.", 1,
		"version", p.build.version, "revision", p.build.revision, "goversion", runtime.Version())
	m.one(ownName+"_log_lines_dropped_total", counter, "Lines of the log that could not be written.",
		float64(p.droppedLines()))
	if c := p.tls.config.Load(); c != nil {
		m.one(ownName+"_tls_certificate_expiry_timestamp_seconds", gauge, "When the certificate of the program expires.",
			unixSeconds(c.Certificates[0].Leaf.NotAfter))
	}
	m.begin(ownName+"_last_reload_successful", gauge,
		"Whether the files that the flag names could be taken up when they last changed.")
	for _, w := range p.watched {
		m.sample(oneIf(!w.broken.Load()), "exporter_name", ownName, "flag", w.files[0].flag)
	}
	if p.tls.clients || p.passwords != nil {
		m.one(ownName+"_requests_refused_total", counter, "Requests without a right password or client certificate.",
			float64(p.refusals.Load()))
	}
}

// processMetrics are the metrics of the process, as they were at a time.
type processMetrics struct {
	*exposition
	read time.Time
}

// processNow returns the metrics of the process, at most a second old. It reads files, so
// it is called before a scrape waits for its turn to render.
func (p *program) processNow() *exposition {
	if p.withoutProcess {
		return &exposition{}
	}
	kept := p.process.Load()
	if kept == nil || time.Since(kept.read) >= time.Second {
		kept = &processMetrics{readProcess(p.started), time.Now()}
		p.process.Store(kept)
	}
	return kept.exposition
}

// readProcess reads the metrics of the process. Those that the system does not tell, as
// where there is no /proc, are left out.
func readProcess(started time.Time) *exposition {
	var m ownMetrics
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
	return m.finish()
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

	mu    sync.Mutex    // guards all below, and the readers and the compressed form of each page
	alive []*sharedPage // oldest first
	ratio float64       // of the last page, its compressed size to its plain size

	zippers sync.Pool // of *gzip.Writer, which take 1.2 MB
	writers sync.Pool // of *bufio.Writer
}

// maxPages is how many pages may be alive at once. When another is needed, the readers of
// the oldest are cut off, unless it is younger than readTime.
const maxPages, readTime = 8, 500 * time.Millisecond

// pageRequest is what a scraper wants.
type pageRequest struct {
	client  string // see clientOf
	sources []*source
	quoted  bool             // names that need quotes have them, not underscores
	gzip    bool             // it takes the page compressed
	newest  func() []*result // holds the newest results of the sources
	render  func(ctx context.Context, results []*result, quoted bool) (*page, error)
}

// sharedPage is a page and those who read it.
type sharedPage struct {
	*page
	sources []*source
	results []*result
	quoted  bool
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
		if sp, err = ps.make(ctx, want); err != nil {
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
	quoted := want.quoted && slices.ContainsFunc(results, (*result).quoted)
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, sp := range ps.alive {
		same := sp.quoted == quoted && slices.Equal(sp.sources, want.sources) && slices.Equal(sp.results, results)
		if same && (sp.zipped != nil || !zipped) {
			sp.readers++
			return sp
		}
	}
	return nil
}

// make renders a page once there is room for it.
func (ps *pages) make(ctx context.Context, want *pageRequest) (*sharedPage, error) {
	if err := ps.makeRoom(ctx); err != nil {
		return nil, err
	}
	results := want.newest()
	quoted := want.quoted && slices.ContainsFunc(results, (*result).quoted)
	pg, err := want.render(ctx, results, quoted)
	if err != nil {
		releaseAll(results)
		return nil, err
	}
	sp := &sharedPage{page: pg, sources: want.sources, results: results, quoted: quoted, readers: 1}
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
	if len(ps.alive) < maxPages {
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
