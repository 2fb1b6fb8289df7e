// This file turns bodies into one valid exposition.
//
// read labels the lines of one body and sorts them by metric family into an
// exposition, which does not change while anybody has it. merge puts any number of expositions
// on one page. It works on families and refers to their lines as ranges of
// bytes: its work grows with the families, not with the samples.

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
	"maps"
	"math"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// ---- Labelling

// Failures of a body that is longer than --max-bytes, and of one of which more than
// four times that would have to be held.
var (
	errTooLarge = errors.New("larger than --max-bytes allows")
	errTooMuch  = fmt.Errorf("so many metric families or so much in added labels that it would take four times --max-bytes in memory: %w", errTooLarge)
)

// addedLabels are what a source adds to each of its samples.
type addedLabels struct {
	names   []string
	text    []byte // as it stands between the braces
	seen    uint64 // see nameBit
	telling bool   // exporter_name is among them
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

// has reports whether a label of that name is among them.
func (a *addedLabels) has(name []byte) bool {
	return slices.ContainsFunc(a.names, func(added string) bool { return added == string(name) })
}

// reader makes the exposition of one body.
type reader struct {
	p      parser
	e      *exposition
	added  *addedLabels
	prefix []byte         // what begins the samples under way, up to their own labels
	taken  [][]byte       // names given to labels of the sample under way
	bare   bool           // write underscores for what needs quotes
	given  map[string]int // bare names of its labels, with how many wanted each

	hash    *hasher
	origins map[[2]uint64][2]uint64 // by bare series, of which series it is
}

// workspace is the memory that a body is read with. What is left in it after that
// serves to read another.
type workspace struct {
	window []byte // of the parser
	body   []byte // of the exposition
}

// read takes a body whole, or fails; it may be OpenMetrics. It holds no more than
// limit bytes.
func read(src io.Reader, openMetrics bool, added *addedLabels, w *workspace, limit int) (*exposition, error) {
	r := reader{
		p:     parser{window: window{src: src, buf: w.window[:0]}, openMetrics: openMetrics},
		e:     &exposition{buf: w.body[:0], telling: added.telling},
		added: added,
	}
	err := r.read(limit)
	w.window, w.body = nil, r.e.buf
	if cap(r.p.buf) <= 2*windowSize { // one that a long line made larger is not worth its memory
		w.window = r.p.buf
	}
	switch {
	case err != nil:
		return nil, err
	case len(r.e.buf) < cap(r.e.buf)/4: // there may be many as small
		r.e.buf = slices.Clone(r.e.buf)
	default:
		w.body = nil // it is the exposition's now
	}
	return r.e, nil
}

// read reads the lines of the body, until its end or until more than limit bytes
// would have to be held, and brings the families into order.
func (r *reader) read(limit int) error {
	for r.p.next() {
		switch r.p.kind {
		case sampleLine:
			r.sample()
		case helpLine:
			r.help()
		case typeLine:
			r.typ()
		}
		if r.e.held() > limit {
			return errTooMuch
		}
		if cap(r.e.buf)-len(r.e.buf) < 1<<10 {
			r.grow(limit)
		}
	}
	if r.p.err != nil {
		return r.p.err
	}
	return r.e.regroup(limit)
}

// grow doubles the buffer, but for what is beyond limit. To let append do it, by
// a quarter at a time, leaves four times as much for the garbage collector.
func (r *reader) grow(limit int) {
	size := len(r.e.buf)
	buf := make([]byte, size, max(min(2*size, limit), size)+2<<10)
	copy(buf, r.e.buf)
	r.e.buf = buf
}

// readText takes a body that is there already, and ends in a newline.
func readText(text []byte) (*exposition, error) {
	r := reader{p: parserOf(text), e: &exposition{}, added: &addedLabels{}}
	err := r.read(math.MaxInt32)
	return r.e, err
}

// sample appends a sample, with the labels that are added to it, to its family.
func (r *reader) sample() {
	if !r.p.repeated {
		r.enter()
	}
	if r.p.plain && r.p.seen()&r.added.seen == 0 {
		r.relay()
	} else {
		r.relabel()
	}
	f := r.last()
	f.lines.to = uint32(len(r.e.buf))
	r.e.samples++
	if r.p.seen()&boundNames != 0 || r.p.buf[r.p.value] == '-' {
		f.contradict(&r.p)
	}
}

// enter makes the family of the sample's name the last one.
func (r *reader) enter() {
	if f := r.last(); f == nil || !f.takes(r.e.text(f.name), r.p.name) && !r.renames() {
		r.begin()
	}
	r.prefix = append(append(r.prefix[:0], r.p.name...), '{')
	if len(r.added.text) > 0 {
		r.prefix = append(append(r.prefix, r.added.text...), ',')
	}
}

// boundNames are the bits of the labels that bound a bucket or a quantile.
var boundNames = nameBit([]byte("le")) | nameBit([]byte("quantile"))

// contradict notes which types the sample speaks against: the strictest parsers
// take no bound that is no number, and no bucket or count below zero.
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

// renames makes a family of OpenMetrics that has no samples yet the last one, under the
// name of this sample, if the text format has that name for it: foo_total for the
// counter foo, foo_info for the info foo, which is a gauge here. One other family may
// stand between: foo_created.
func (r *reader) renames() bool {
	n := len(r.e.families)
	for i := n - 1; i >= max(0, n-2) && r.p.openMetrics; i-- {
		f := r.e.families[i]
		suffix, ok := bytes.CutPrefix(r.p.name, r.e.text(f.name))
		ok = ok && (f.metricType == counter && string(suffix) == "_total" || f.metricType == gauge && string(suffix) == "_info")
		if ok && f.lines.from == f.lines.to {
			f.name = r.e.copy(r.p.name)
			f.lines = span{f.name.to, f.name.to}
			r.e.families = append(slices.Delete(r.e.families, i, i+1), f)
			return true
		}
	}
	return false
}

// relay appends a plain sample as it came, behind its name and the added labels.
func (r *reader) relay() {
	out := append(r.e.buf, r.prefix...)
	if len(r.p.labels) == 0 {
		out = out[:len(out)-1]
		if len(r.added.text) > 0 {
			out = append(out, '}')
		}
	}
	r.e.buf = append(out, r.p.tail()...)
}

// relabel appends a sample that has to be written anew: it is not plain, or one
// of its labels gives way to one that is added.
func (r *reader) relabel() {
	out, open := r.appendName(r.e.buf), byte('{')
	if len(out) > len(r.e.buf)+len(r.p.name) { // quoted, in braces
		open = ','
	}
	if len(r.added.text) > 0 {
		out = append(append(out, open), r.added.text...)
		open = ','
	}
	r.taken, r.given = r.taken[:0], nil
	for _, l := range r.p.labels {
		out = r.appendLabel(append(out, open), l)
		open = ','
	}
	if open == ',' {
		out = append(out, '}')
	}
	out = append(append(out, ' '), r.p.valueText()...)
	if len(r.p.stamp) > 0 {
		out = append(append(out, ' '), r.p.stamp...)
	}
	r.e.buf = append(out, '\n')
}

// appendName appends the name of the sample, in a brace if it needs quotes.
func (r *reader) appendName(dst []byte) []byte {
	if isBareName(r.p.name) {
		return append(dst, r.p.name...)
	}
	return append(append(append(dst, `{"`...), r.p.name...), '"')
}

// appendLabel appends a label of the sample, under a free name if its own is
// taken by an added one.
func (r *reader) appendLabel(dst []byte, l label) []byte {
	name := r.p.labelName(l)
	if r.added.has(name) {
		name = r.exported(name)
	}
	if r.bare {
		name = r.bareLabel(name)
	}
	if isBareLabel(name) {
		dst = append(dst, name...)
	} else {
		dst = append(append(append(dst, '"'), name...), '"')
		r.last().quoted = true
	}
	dst = append(dst, `="`...)
	return append(appendRespelled(dst, r.p.labelText(l), `\"n`), '"')
}

// exported returns the name under which a label of the sample gives way to an
// added one: as in Prometheus, with exported_ before it until it is free.
func (r *reader) exported(name []byte) []byte {
	n := len(r.taken)
	r.taken = slices.Grow(r.taken, 1)[:n+1]
	free := append(r.taken[n][:0], name...)
	same := func(name []byte) bool { return bytes.Equal(name, free) }
	for r.added.has(free) || slices.ContainsFunc(r.taken[:n], same) || r.p.hasLabel(free) {
		free = slices.Insert(free, 0, []byte("exported_")...)
	}
	r.taken[n] = free
	return free
}

// bareLabel returns the name of a label of the sample with underscores for what
// needs quotes, and with a number behind them if another label has that.
func (r *reader) bareLabel(name []byte) []byte {
	if isBareLabel(name) {
		return name
	}
	if len(r.given) == 0 {
		r.given = map[string]int{}
		for _, l := range r.p.labels {
			if name := r.p.labelName(l); isBareLabel(name) {
				r.given[string(name)] = 1
			}
		}
	}
	name = bytes.ReplaceAll(underscores(name), []byte(":"), []byte("_"))
	wanted := string(name)
	for r.given[string(name)] > 0 {
		r.given[wanted]++
		name = strconv.AppendInt([]byte(wanted+"_"), int64(r.given[wanted]), 10)
	}
	r.given[string(name)] = 1
	return name
}

// underscores returns a name with an underscore for each character that needs
// quotes: what Prometheus calls escaping=underscores.
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

// help keeps the HELP text of a family, if it is the first.
func (r *reader) help() {
	f := r.last()
	if f == nil || !bytes.Equal(r.e.text(f.name), r.p.name) || f.lines.from < f.lines.to {
		f = r.begin()
	}
	if f.help.from == f.help.to {
		text := bytes.TrimRight(r.p.text, "\r") // which would be taken for a part of the line's end
		if r.p.openMetrics {
			text = []byte(unquoteHelp.Replace(string(text)))
		}
		f.help.from = uint32(len(r.e.buf))
		r.e.buf = appendRespelled(r.e.buf, text, `\n`)
		f.help.to = uint32(len(r.e.buf))
		f.lines = span{f.help.to, f.help.to}
	}
}

// escape makes of a text what stands for it in a label value.
var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// unescape makes of a label value or a quoted name what it means.
var unescape = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\n`, "\n")

// unquoteHelp takes away the escape that OpenMetrics has and the text format has not.
var unquoteHelp = strings.NewReplacer(`\\`, `\\`, `\"`, `"`)

// typ keeps the type of a family. Untyped is no opinion; two opinions make two
// families, until regroup.
func (r *reader) typ() {
	f := r.last()
	differs := f != nil && f.metricType != untyped && r.p.metricType != untyped && f.metricType != r.p.metricType
	if f == nil || differs || !bytes.Equal(r.e.text(f.name), r.p.name) {
		f = r.begin()
	}
	if r.p.metricType != untyped {
		f.metricType = r.p.metricType
	}
}

// last returns the family that the last line belongs to, nil before the first.
func (r *reader) last() *family {
	if n := len(r.e.families); n > 0 {
		return &r.e.families[n-1]
	}
	return nil
}

// begin begins a family of the name that the parser stands at.
func (r *reader) begin() *family {
	name := r.e.copy(r.p.name)
	none := span{name.to, name.to}
	r.e.families = append(r.e.families, family{name: name, help: none, lines: none, quoted: !isBareName(r.p.name)})
	return r.last()
}

// appendRespelled appends a text as it stands in a body, with a backslash
// doubled unless one of escapes is behind it, and newlines escaped.
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

// exposition is one body with its labels added, its families in the order of
// their names. It does not change while anybody has it, so that scrapes can share it.
type exposition struct {
	buf      []byte // names, HELP texts and lines of the families
	families []family
	samples  int
	telling  bool // its labels tell its series from those of all other bodies
	quoted   bool // some of its families are
	escaped  bool // its names had quotes, so others may have its series, too

	dropped   int      // samples left out because without quotes another series is the same
	repeating []string // families that those were of
}

// text returns a range of the exposition.
func (e *exposition) text(s span) []byte { return e.buf[s.from:s.to] }

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

// familySize is the memory that a family takes, in bytes: 28 here, as much again
// while their slice grows, 48 when it is merged and its lines of metadata.
const familySize = 128

// takes reports whether samples of a name belong to the family.
func (f *family) takes(family, sample []byte) bool {
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

// regroup brings the families into order. Where a body scattered a family over
// several places, or typed it behind its samples, it lays the buffer anew, if
// two buffers are within limit.
func (e *exposition) regroup(limit int) error {
	e.sort()
	e.quoted = slices.ContainsFunc(e.families, func(f family) bool { return f.quoted })
	if e.grouped() {
		return nil
	}
	if len(e.buf)+e.held() > limit {
		return errTooMuch
	}
	e.adopt()
	whole := exposition{buf: make([]byte, 0, len(e.buf))}
	for _, g := range groupsOf(gather([]*exposition{e})) {
		whole.join(g)
	}
	e.buf, e.families = whole.buf, whole.families
	return nil
}

// held is the memory that the exposition takes, and a page made of it, in bytes.
func (e *exposition) held() int { return len(e.buf) + len(e.families)*familySize }

// unquoted returns the exposition for scrapers that know no quotes: as it is but
// for the quoted families, and those with underscores apart, as series of them may
// have fallen together.
func (e *exposition) unquoted() []*exposition {
	if !e.quoted {
		return []*exposition{e}
	}
	rest := &exposition{buf: e.buf, telling: e.telling}
	r := reader{e: &exposition{telling: e.telling, escaped: true}, added: &addedLabels{}, bare: true}
	r.hash, r.origins = newHasher(), map[[2]uint64][2]uint64{}
	for _, f := range e.families {
		if f.quoted {
			r.rewrite(e, f)
		} else {
			rest.families = append(rest.families, f)
		}
	}
	r.e.regroup(math.MaxInt) // which is enough for all that was read before
	return []*exposition{rest, r.e}
}

// rewrite adds a family of another exposition with underscores for what needs quotes.
func (r *reader) rewrite(from *exposition, f family) {
	text := from.text(f.lines)
	r.p = parser{window: window{buf: text}, line: line{labels: r.p.labels}}
	r.p.name = underscores(from.text(f.name))
	r.begin().metricType = f.metricType
	r.p.text = from.text(f.help)
	r.help()
	var name, bare []byte
	for r.p.next() {
		if !bytes.Equal(r.p.name, name) {
			name, bare = r.p.name, underscores(r.p.name)
		}
		series := r.hash.series(&r.p)
		before := r.last().lines.to
		r.p.name = bare // the parser repeats only names that are bare already
		r.sample()
		r.distinguish(series, before)
	}
}

// distinguish takes the last sample back if, without quotes, it is of the same series
// as one of another series was. The line before it ends at before.
func (r *reader) distinguish(series [2]uint64, before uint32) {
	f := r.last()
	line := span{max(before, f.lines.from), f.lines.to}
	text := r.e.text(line)
	p := parserOf(text)
	p.next()
	bare := r.hash.series(&p)
	if first, there := r.origins[bare]; there && first != series {
		r.e.buf, f.lines.to = r.e.buf[:line.from], line.from
		r.e.samples--
		r.e.dropped++
		r.e.repeating = append(r.e.repeating, string(r.e.text(f.name)))
		return
	}
	r.origins[bare] = series
}

// sort sorts the families by name, and those of one name as they came.
func (e *exposition) sort() {
	slices.SortFunc(e.families, func(a, b family) int {
		if c := bytes.Compare(e.text(a.name), e.text(b.name)); c != 0 {
			return c
		}
		return cmp.Compare(a.lines.from, b.lines.from)
	})
}

// grouped reports whether each family, in order, is there once and has lines.
func (e *exposition) grouped() bool {
	for i, f := range e.families {
		if f.lines.from == f.lines.to || i > 0 && bytes.Equal(e.text(e.families[i-1].name), e.text(f.name)) {
			return false
		}
	}
	return true
}

// adopt makes the untyped families that a histogram or summary of the body claims
// pieces of that.
func (e *exposition) adopt() {
	var found []int
	claimed := false
	for i, f := range e.families {
		name := e.text(f.name)
		if i == 0 || !bytes.Equal(name, e.text(e.families[i-1].name)) {
			claimed = e.claims(name)
		}
		if claimed && f.metricType == untyped {
			found = append(found, i)
		}
	}
	for _, i := range found {
		e.families[i].fold(e)
	}
	e.sort()
}

// claims reports whether a histogram or summary claims the name. Three names at
// most look at all pieces of one family, so that this stays linear.
func (e *exposition) claims(name []byte) bool {
	end := max(bytes.LastIndexByte(name, '_'), 0)
	base, suffix := name[:end], string(name[end:])
	if !histogram.claims(suffix) {
		return false
	}
	i, _ := slices.BinarySearchFunc(e.families, base, func(f family, name []byte) int {
		return bytes.Compare(e.text(f.name), name)
	})
	for ; i < len(e.families) && bytes.Equal(e.text(e.families[i].name), base); i++ {
		if e.families[i].metricType.claims(suffix) {
			return true
		}
	}
	return false
}

// fold gives a family the name of the one that claims it. Its HELP text says what
// h_count is, not what h is, and goes.
func (f *family) fold(e *exposition) {
	f.name.to = f.name.from + uint32(bytes.LastIndexByte(e.text(f.name), '_'))
	f.help.to = f.help.from
}

// join appends the pieces of one family that another exposition holds: the
// first HELP text, the type, and all lines. Without lines there is no family.
func (e *exposition) join(pieces group) {
	f := family{name: e.copy(pieces.name()), metricType: pieces.metricType()}
	for _, piece := range pieces {
		if f.help.from == f.help.to {
			f.help = e.copy(piece.text(piece.help))
		}
		f.quoted = f.quoted || piece.quoted
		f.noHistogram = f.noHistogram || piece.noHistogram
		f.noSummary = f.noSummary || piece.noSummary
	}
	f.lines.from = uint32(len(e.buf))
	for _, piece := range pieces {
		e.copy(piece.text(piece.lines))
	}
	if f.lines.to = uint32(len(e.buf)); f.lines.from < f.lines.to {
		e.families = append(e.families, f)
	}
}

// copy appends text to the buffer.
func (e *exposition) copy(text []byte) span {
	from := uint32(len(e.buf))
	e.buf = append(e.buf, text...)
	return span{from, uint32(len(e.buf))}
}

// with joins two opinions on the type of one family.
func (t metricType) with(other metricType) metricType {
	switch {
	case t == untyped || t == other:
		return other
	case other == untyped:
		return t
	}
	return conflicting
}

// ---- Merging

// merge puts bodies on one page: families in the order of their names, the
// samples of each in the order of the bodies.
func merge(bodies []*exposition) *page {
	parts := gather(bodies)
	groups := groupsOf(parts)
	v := judge(groups)
	if len(v) > 0 {
		groups = groupsOf(settle(parts, v))
	}
	pg := &page{conflicts: v.conflicts()}
	for _, e := range bodies {
		pg.duplicates += e.dropped
		pg.repeating = append(pg.repeating, slices.Compact(slices.Clone(e.repeating))...)
	}
	for _, g := range groups {
		pg.addFamily(g)
	}
	pg.flush()
	return pg
}

// page is one valid exposition, ready to be written. It refers to long runs of
// lines where they are and holds the rest.
type page struct {
	chunks     [][]byte
	size       int
	duplicates int      // samples left out because an earlier body has the series
	repeating  []string // families that those were of, in order
	conflicts  []string // families served untyped, in order
	tail       []byte   // the chunk being filled
}

// part is what one body has of a family on a page.
type part struct {
	body *exposition
	rank int32  // of the body
	at   uint32 // where its lines begin in the body
	*family
}

// text returns a range of the part's body.
func (p *part) text(s span) []byte { return p.body.text(s) }

// group is all parts of one family, by body.
type group []part

// name returns the name of the family.
func (g group) name() []byte { return g[0].text(g[0].name) }

// metricType returns what the parts agree on.
func (g group) metricType() metricType {
	t := untyped
	for _, p := range g {
		t = t.with(p.metricType)
	}
	return t
}

// contradicts reports whether a sample of the group speaks against the type.
func (g group) contradicts(t metricType) bool {
	return slices.ContainsFunc(g, func(p part) bool {
		return t == histogram && p.noHistogram || t == summary && p.noSummary
	})
}

// gather lists the families of all bodies.
func gather(bodies []*exposition) []part {
	n := 0
	for _, e := range bodies {
		n += len(e.families)
	}
	parts := make([]part, 0, n)
	for rank, e := range bodies {
		for i := range e.families {
			parts = append(parts, part{e, int32(rank), e.families[i].lines.from, &e.families[i]})
		}
	}
	return parts
}

// groupsOf sorts parts by name, and puts those of one name into a group.
func groupsOf(parts []part) []group {
	slices.SortFunc(parts, func(a, b part) int {
		if c := bytes.Compare(a.text(a.name), b.text(b.name)); c != 0 {
			return c
		}
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.at, b.at))
	})
	groups := make([]group, 0, len(parts))
	for len(parts) > 0 {
		n := 1
		for n < len(parts) && bytes.Equal(parts[n].text(parts[n].name), parts[0].text(parts[0].name)) {
			n++
		}
		groups = append(groups, parts[:n])
		parts = parts[n:]
	}
	return groups
}

// verdicts say, by name, which families of a page cannot stay as they are.
type verdicts map[string]verdict

type verdict uint8

const (
	toSplit verdict = iota + 1 // into untyped families, one for each sample name
	toFold                     // into the histogram or summary that claims the name
)

// judge finds the families whose types differ or that have samples which no such
// type has, those whose names a histogram or summary of any body claims although
// they have another type, and those that can be folded because they have none.
func judge(groups []group) verdicts {
	v := verdicts{}
	for _, g := range groups {
		t := g.metricType()
		below := claimed(groups, g)
		clash := t == conflicting || g.contradicts(t)
		for _, c := range below {
			clash = clash || c.metricType() != untyped || c.contradicts(t)
		}
		if clash {
			v[string(g.name())] = toSplit
		}
		for _, c := range below {
			if c.metricType() != untyped {
				v[string(c.name())] = toSplit
			} else if v[string(g.name())] != toSplit {
				v[string(c.name())] = toFold
			}
		}
	}
	return v
}

// claimed lists the groups whose names a histogram or summary in g claims.
func claimed(groups []group, g group) []group {
	var found []group
	for _, suffix := range []string{"_bucket", "_count", "_sum"} {
		if !slices.ContainsFunc(g, func(p part) bool { return p.metricType.claims(suffix) }) {
			continue
		}
		name := append(slices.Clone(g.name()), suffix...)
		i, ok := slices.BinarySearchFunc(groups, name, func(g group, name []byte) int {
			return bytes.Compare(g.name(), name)
		})
		if ok {
			found = append(found, groups[i])
		}
	}
	return found
}

// conflicts lists the families that are split, in order.
func (v verdicts) conflicts() []string {
	names := slices.Sorted(maps.Keys(v))
	return slices.DeleteFunc(names, func(name string) bool { return v[name] != toSplit })
}

// settle returns the parts as the verdicts want them.
func settle(parts []part, v verdicts) []part {
	settled := make([]part, 0, len(parts))
	for _, p := range parts {
		switch v[string(p.text(p.name))] {
		case toSplit:
			settled = append(settled, p.split()...)
		case toFold:
			folded := *p.family
			folded.fold(p.body)
			p.family = &folded
			fallthrough
		default:
			settled = append(settled, p)
		}
	}
	return settled
}

// split returns the lines of a family as untyped families, one for each sample
// name, of which there are four at most.
func (p *part) split() []part {
	var all []part
	for at := p.lines.from; at < p.lines.to; {
		name := p.text(p.body.sampleName(at))
		i := slices.IndexFunc(all, func(q part) bool { return bytes.Equal(q.text(q.name), name) })
		if i < 0 {
			i = len(all)
			e := &exposition{telling: p.body.telling, escaped: p.body.escaped}
			f := &family{name: e.copy(name)}
			if bytes.Equal(name, p.text(p.name)) {
				f.help = e.copy(p.text(p.help))
			}
			f.lines.from = uint32(len(e.buf))
			all = append(all, part{e, p.rank, at, f})
		}
		end := at + uint32(bytes.IndexByte(p.body.buf[at:], '\n')) + 1
		all[i].lines.to = all[i].body.copy(p.text(span{at, end})).to
		at = end
	}
	return all
}

// sampleName returns where the name of the line at stands.
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

// addFamily adds one family: its HELP and TYPE lines and all its samples.
func (pg *page) addFamily(g group) {
	if cap(pg.tail)-len(pg.tail) < 1<<10 {
		pg.flush()
		pg.tail = make([]byte, 0, 32<<10)
	}
	for _, p := range g {
		if p.help.from < p.help.to {
			pg.addMetadata("# HELP ", g.name(), p.text(p.help))
			break
		}
	}
	pg.addMetadata("# TYPE ", g.name(), []byte(typeNames[g.metricType()]))
	if g.mayRepeat() {
		pg.addDistinct(g)
		return
	}
	for _, p := range g {
		pg.addLines(p.text(p.lines))
	}
}

// addMetadata adds a HELP or TYPE line.
func (pg *page) addMetadata(what string, name, text []byte) {
	pg.tail = append(pg.tail, what...)
	if isBareName(name) {
		pg.tail = append(pg.tail, name...)
	} else {
		pg.tail = append(append(append(pg.tail, '"'), name...), '"')
	}
	pg.tail = append(append(append(pg.tail, ' '), text...), '\n')
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

// mayRepeat reports whether two bodies may have the same series in the family.
func (g group) mayRepeat() bool {
	untold := func(p part) bool { return !p.body.telling || p.body.escaped }
	return g[0].rank != g[len(g)-1].rank && slices.ContainsFunc(g, untold)
}

// addDistinct adds the samples of a family but for those whose series an earlier
// body has.
func (pg *page) addDistinct(g group) {
	hash := newHasher()
	before := pg.duplicates
	ranks := map[[2]uint64]int32{} // of the first body that has the series
	for _, part := range g {
		lines := part.text(part.lines)
		p := parserOf(lines)
		kept := 0
		for p.next() {
			series := hash.series(&p)
			rank, there := ranks[series]
			if !there {
				ranks[series] = part.rank
			} else if rank != part.rank {
				pg.addLines(lines[kept:p.start])
				pg.duplicates++
				kept = p.pos
			}
		}
		pg.addLines(lines[kept:])
	}
	if pg.duplicates > before {
		pg.repeating = append(pg.repeating, string(g.name()))
	}
}

// hasher tells series apart by 128 bits of keyed hash: of a million, two share one
// with a probability of 10⁻²⁷.
type hasher struct {
	seeds [2]maphash.Seed
	key   []byte
}

// newHasher returns one with keys of its own.
func newHasher() *hasher {
	return &hasher{seeds: [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}}
}

// series hashes the series of the parser's sample.
func (h *hasher) series(p *parser) [2]uint64 {
	h.key = p.appendSeries(h.key[:0])
	return [2]uint64{maphash.Bytes(h.seeds[0], h.key), maphash.Bytes(h.seeds[1], h.key)}
}

// appendSeries appends a spelling of the sample's series that does not depend
// on the order of its labels. An empty label is no label.
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

// ---- Status metrics

// render merges results with the status metrics that tell of them. Those have
// the counts of the page itself, so a page with any is merged again.
func (p *program) render(sources []*source, results []*result, quoted bool) *page {
	bodies := []*exposition{nil} // a place for the status metrics
	for _, r := range results {
		for _, e := range r.bodies {
			if quoted {
				bodies = append(bodies, e)
			} else {
				bodies = append(bodies, e.unquoted()...)
			}
		}
	}
	var conflicts, duplicates int
	for {
		own, err := readText(p.appendStatus(nil, sources, results, conflicts, duplicates))
		if err != nil {
			panic(err)
		}
		bodies[0] = own
		pg := merge(bodies)
		if len(pg.conflicts) == conflicts && pg.duplicates == duplicates {
			return pg
		}
		conflicts, duplicates = len(pg.conflicts), pg.duplicates
		for _, name := range pg.conflicts {
			p.tellOnce(name, "the types of a metric family are in conflict: served untyped", "family", name)
		}
		for _, name := range pg.repeating {
			p.tellOnce(name, "the same series is there twice, from sources without a telling label or by names that lost their quotes: the first is served", "family", name)
		}
	}
}

// tellOnce logs what is worth a warning once for each subject, of which it keeps
// a thousand in mind.
func (p *program) tellOnce(subject, what string, attrs ...any) {
	p.toldMu.Lock()
	known := p.told[what+subject] || len(p.told) == 1000
	if !known {
		p.told[what+subject] = true
	}
	p.toldMu.Unlock()
	if !known {
		p.log.Warn(what, attrs...)
	}
}

// appendStatus appends the status metrics of an endpoint's sources and of the
// program itself.
func (p *program) appendStatus(dst []byte, sources []*source, results []*result, conflicts, duplicates int) []byte {
	m := &metrics{buf: dst}
	counted := make([]counts, len(sources))
	for i, s := range sources {
		counted[i] = s.status.snapshot()
	}
	each := func(family, metricType, help string, value func(i int) float64) {
		m.begin(ownName+"_source_"+family, metricType, help)
		for i, s := range sources {
			if v := value(i); !math.IsNaN(v) {
				m.sample(v, "exporter_name", s.name)
			}
		}
	}
	each("up", "gauge", "Whether the source delivered for this scrape.", func(i int) float64 { return oneIf(results[i].failure == nil) })
	each("scrape_duration_seconds", "gauge", "How long the fetch took.", func(i int) float64 {
		if results[i].start.IsZero() { // it missed the deadline
			return math.NaN()
		}
		return results[i].end.Sub(results[i].start).Seconds()
	})
	each("samples_scraped", "gauge", "Samples that the source delivered.", func(i int) float64 { return float64(results[i].samples()) })
	each("body_bytes", "gauge", "Size of what the source delivered, decompressed.", func(i int) float64 { return float64(results[i].bytes) })
	each("last_success_timestamp_seconds", "gauge", "When the last fetch succeeded.", func(i int) float64 {
		if counted[i].lastSuccess.IsZero() {
			return math.NaN()
		}
		return unixSeconds(counted[i].lastSuccess)
	})
	each("fetches_total", "counter", "Fetches that ended and were not abandoned by their scrapers.", func(i int) float64 { return float64(counted[i].fetches) })
	m.begin(ownName+"_source_failures_total", "counter", "Failed fetches, and scrapes that found the source busy.")
	for i, s := range sources {
		for _, reason := range reasons[s.kind] {
			m.sample(float64(counted[i].failures[reason]), "exporter_name", s.name, "reason", reason)
		}
	}
	m.begin(ownName+"_file_mtime_seconds", "gauge", "When the file was last modified.")
	for i, s := range sources {
		for _, f := range results[i].files {
			m.sample(unixSeconds(f.mtime), "exporter_name", s.name, "file", f.name)
		}
	}
	p.appendOwn(m, conflicts, duplicates)
	return m.buf
}

// metrics writes the text format.
type metrics struct {
	buf    []byte
	family string
}

// begin begins a metric family.
func (m *metrics) begin(family, metricType, help string) {
	m.family = family
	m.buf = fmt.Appendf(m.buf, "# HELP %s %s\n# TYPE %s %s\n", family, help, family, metricType)
}

// sample adds a sample with the labels of pairs.
func (m *metrics) sample(value float64, pairs ...string) {
	m.buf = append(m.buf, m.family...)
	for i := 0; i < len(pairs); i += 2 {
		m.buf = append(append(append(m.buf, "{,"[min(i, 1)]), pairs[i]...), `="`...)
		m.buf = append(append(m.buf, escape.Replace(strings.ToValidUTF8(pairs[i+1], "\uFFFD"))...), '"')
	}
	m.buf = append(m.buf, "} "...)
	m.buf = append(strconv.AppendFloat(m.buf, value, 'g', -1, 64), '\n')
}

// appendOwn appends what is to be told of the page and the program. What needs
// /proc is left out where there is none.
func (p *program) appendOwn(m *metrics, conflicts, duplicates int) {
	one := func(family, metricType, help string, value float64, pairs ...string) {
		m.begin(family, metricType, help)
		m.sample(value, append(pairs, "exporter_name", ownName)...)
	}
	one(ownName+"_conflicting_families", "gauge", "Metric families served untyped, as the sources disagree on them.", float64(conflicts))
	one(ownName+"_duplicate_series_dropped", "gauge", "Samples left out, as an earlier source has the same series.", float64(duplicates))
	one(ownName+"_build_info", "gauge", "The version of the program.", 1, "version", version, "goversion", runtime.Version())

	m.begin(ownName+"_last_reload_successful", "gauge", "Whether the files that the flag names could be taken up when they last changed.")
	for _, w := range p.watched {
		m.sample(oneIf(!w.broken.Load()), "exporter_name", ownName, "flag", w.files[0].flag)
	}

	if p.tls.clients || p.passwords != nil {
		one(ownName+"_requests_refused_total", "counter", "Requests without a right password or client certificate.", float64(p.refusals.Load()))
	}

	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	one("go_info", "gauge", "Information about the Go environment.", 1, "version", runtime.Version())
	one("go_goroutines", "gauge", "Number of goroutines that currently exist.", float64(runtime.NumGoroutine()))
	one("go_memstats_heap_alloc_bytes", "gauge", "Number of heap bytes allocated and currently in use.", float64(mem.HeapAlloc))
	one("go_memstats_sys_bytes", "gauge", "Number of bytes obtained from system.", float64(mem.Sys))

	one("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", unixSeconds(p.started))
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) == nil {
		one("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.",
			float64(usage.Utime.Nano()+usage.Stime.Nano())/1e9)
	}
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		one("process_max_fds", "gauge", "Maximum number of open file descriptors.", float64(limit.Cur))
	}
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		one("process_open_fds", "gauge", "Number of open file descriptors.", float64(len(fds)))
	}
	statm, _ := os.ReadFile("/proc/self/statm")
	if sizes := strings.Fields(string(statm)); len(sizes) >= 2 {
		virtual, _ := strconv.ParseFloat(sizes[0], 64)
		resident, _ := strconv.ParseFloat(sizes[1], 64)
		page := float64(os.Getpagesize())
		one("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", virtual*page)
		one("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", resident*page)
	}
}

// oneIf returns 1 for true.
func oneIf(so bool) float64 {
	if so {
		return 1
	}
	return 0
}

// unixSeconds returns a time as a metric has it.
func unixSeconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1e3 }

// ---- Sharing pages

// pages shares the page of scrapes that would render the same.
type pages struct {
	mu    sync.Mutex // guards alive, and the readers and the time of each page
	alive []*sharedPage
	freed sync.Cond     // waits for a page to be made, to be closed, or to be old enough to be cut off
	turn  chan struct{} // has room for the one who renders or compresses

	zippers sync.Pool // of *gzip.Writer, which take 1.2 MB
	writers sync.Pool // of *bufio.Writer
}

// maxPages is how many pages may be alive at once. When another is needed, one whose
// readers have had their time is cut off.
const maxPages, readTime = 8, 500 * time.Millisecond

// sharedPage is a page, plain and compressed, and those who read it.
type sharedPage struct {
	sources []*source
	results []*result
	quoted  bool // names that need quotes have them, not underscores
	readers int
	sent    time.Time       // when the first reader began, zero before
	ctx     context.Context // done when its readers are to be cut off
	cut     context.CancelFunc

	page   func() *page // renders it when it is first called
	zipped func() []byte
}

// open returns the page of what take returns, which render makes if nobody has it yet.
// It waits until there is room for a page and no other is in the making, and only then
// takes: so scrapes that wait hold nothing and end up with one page. It returns nil if
// the client has left.
func (ps *pages) open(client context.Context, sources []*source, quotes bool, take func() []*result, render func([]*source, []*result, bool) *page) *sharedPage {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for client.Err() == nil {
		sp := &sharedPage{sources: sources, results: take(), readers: 1}
		sp.quoted = quotes && slices.ContainsFunc(sp.results, (*result).quoted)
		if i := slices.IndexFunc(ps.alive, sp.same); i >= 0 {
			releaseAll(sp.results) // the other holds them
			ps.alive[i].readers++
			return ps.alive[i]
		}
		inMaking := func(sp *sharedPage) bool { return sp.sent.IsZero() }
		if !slices.ContainsFunc(ps.alive, inMaking) && (len(ps.alive) < maxPages || ps.cutOldest()) {
			ps.add(sp, render)
			return sp
		}
		releaseAll(sp.results)
		ps.wait(client)
	}
	return nil
}

// same reports whether the pages would be the same.
func (sp *sharedPage) same(other *sharedPage) bool {
	return sp.quoted == other.quoted && slices.Equal(sp.sources, other.sources) && slices.Equal(sp.results, other.results)
}

// cutOldest cuts off the readers of the page that has been read for longest, if they
// have had their time.
func (ps *pages) cutOldest() bool {
	for i, sp := range ps.alive {
		if time.Since(sp.sent) >= readTime {
			sp.cut()
			ps.alive = slices.Delete(ps.alive, i, i+1)
			return true
		}
	}
	return false
}

// wait waits until there may be room for another page, or the client has left.
func (ps *pages) wait(client context.Context) {
	wake := func() {
		ps.mu.Lock()
		defer ps.mu.Unlock()
		ps.freed.Broadcast()
	}
	defer time.AfterFunc(readTime, wake).Stop()
	defer context.AfterFunc(client, wake)()
	ps.freed.Wait()
}

// add makes a page one of those that are alive.
func (ps *pages) add(sp *sharedPage, render func([]*source, []*result, bool) *page) {
	sp.ctx, sp.cut = context.WithCancel(context.Background())
	sp.page = sync.OnceValue(func() (pg *page) {
		ps.exclusively(sp, func() { pg = render(sp.sources, sp.results, sp.quoted) })
		return pg
	})
	sp.zipped = sync.OnceValue(func() (zipped []byte) {
		pg := sp.page() // in a turn of its own
		ps.exclusively(sp, func() { zipped = ps.zip(pg) })
		return zipped
	})
	ps.alive = append(ps.alive, sp)
}

// begin notes that a reader begins.
func (ps *pages) begin(sp *sharedPage) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if sp.sent.IsZero() {
		sp.sent = time.Now()
		ps.freed.Broadcast()
	}
}

// exclusively runs what takes much memory for a page, unless its readers were cut off
// before its turn came.
func (ps *pages) exclusively(sp *sharedPage, do func()) {
	ps.turn <- struct{}{}
	defer func() { <-ps.turn }()
	if sp.ctx.Err() != nil {
		panic(http.ErrAbortHandler)
	}
	do()
}

// releaseAll releases the results of a page.
func releaseAll(results []*result) {
	for _, r := range results {
		r.release()
	}
}

// close gives a page back. It is dropped with its last reader.
func (ps *pages) close(sp *sharedPage) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if sp.readers--; sp.readers > 0 {
		return
	}
	sp.cut()
	ps.alive = slices.DeleteFunc(ps.alive, func(other *sharedPage) bool { return other == sp })
	releaseAll(sp.results)
	ps.freed.Broadcast()
}

// zip returns a page compressed.
func (ps *pages) zip(pg *page) []byte {
	var out bytes.Buffer
	z, ok := ps.zippers.Get().(*gzip.Writer)
	if !ok {
		z, _ = gzip.NewWriterLevel(nil, gzip.BestSpeed)
	}
	defer ps.zippers.Put(z)
	z.Reset(&out)
	for _, chunk := range pg.chunks {
		z.Write(chunk)
	}
	z.Close()
	z.Reset(nil)
	return out.Bytes()
}
