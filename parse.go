// This file turns one body of the Prometheus text format, or of OpenMetrics,
// into its lines.
//
// It begins with what a line is, the parser, and next, which finds the next line.
// The states follow in the order of the grammar. Each takes the index in the window
// at which it begins, and returns the index after what it scanned, or -1 after a
// fault. The predicates are last.
//
// Names, labels and values are slices of the window: nothing is allocated per line, and
// nothing is copied but quoted names that have to be respelled. The window ends in a
// newline, so loops that skip one kind of byte need not look for its end. Names, label
// values and numbers are scanned eight bytes at a time; the slice of eight has both bounds,
// as it takes fewer instructions than one to the end.
//
// The text format is read as leniently as Prometheus reads it, or more so where the
// meaning is clear; OpenMetrics as strictly as Prometheus reads it: one blank where
// blanks belong, no comments, no empty lines.

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ---- Lines

const (
	windowSize = 64 << 10 // bytes that a parser reads at once
	maxLabels  = 1 << 16  // labels that one sample may have
	fewLabels  = 32       // fewer labels are compared one by one; from here on, sorting is faster
)

// lineKind tells which fields and methods of a parser belong to the line.
type lineKind uint8

const (
	sampleLine lineKind = iota // name, labels, valueText, stamp, exemplar, repeated, plain, tail
	helpLine                   // name, text
	typeLine                   // name, metricType
	unitLine                   // name, text
	eofLine                    // checked, but not handed out
)

// metadataWords are what metadata begins with after the #.
var metadataWords = [...]string{helpLine: "HELP", typeLine: "TYPE", unitLine: "UNIT"}

// metricType is the type of a metric family; the zero value is untyped.
type metricType uint8

const (
	untyped metricType = iota
	counter
	gauge
	histogram
	summary
	info
	stateset
	gaugeHistogram
	unknown     // none, in spite of what its samples are named
	conflicting // two types that differ
)

// typeNames are the words for the types in the text format, which has no others.
var typeNames = [...]string{
	untyped: "untyped", counter: "counter", gauge: "gauge", histogram: "histogram", summary: "summary",
	info: "gauge", stateset: "gauge", gaugeHistogram: "untyped", unknown: "untyped", conflicting: "untyped",
}

// openMetricsNames are the words for the types in OpenMetrics.
var openMetricsNames = [...]string{
	untyped: "unknown", counter: "counter", gauge: "gauge", histogram: "histogram", summary: "summary",
	info: "info", stateset: "stateset", gaugeHistogram: "gaugehistogram", unknown: "unknown", conflicting: "unknown",
}

// line is what next has found.
type line struct {
	kind       lineKind
	start      int    // where the line begins in the window
	pos        int    // where the next line begins
	name       []byte // as written, without its quotes
	text       []byte // HELP text, escapes as written
	metricType metricType
	labels     []label
	value      int    // where the value begins in the window
	stamp      []byte // timestamp as written: milliseconds, in OpenMetrics seconds; empty if there is none
	exemplar   []byte // as written, from the # on; empty if there is none
	quotes     bool   // a label name of the exemplar has quotes
	repeated   bool   // the line before was a sample of this name; may be missed
	plain      bool   // tail is as the format's own encoder would write it
}

// label is where one label of a sample stands, in bytes from the start of the line.
type label struct {
	name, nameEnd int32
	value, end    int32  // end is after the closing quote
	seen          uint64 // names of this label and those before it, see nameBit
}

// A syntaxError says where a body breaks the format and how, but not what
// stands there: bodies may hold secrets.
type syntaxError struct {
	line, column int // from 1; the column counts bytes
	fault        string
}

func (e *syntaxError) Error() string {
	return fmt.Sprintf("line %d, column %d: %s", e.line, e.column, e.fault)
}

// ---- The parser

// parser finds the lines of one body. Set the src of a zero parser, call next until
// it is false, then look at err. The slices of a line are good until the next call.
type parser struct {
	window
	line
	openMetrics bool  // the body is OpenMetrics
	err         error // what ended the body; nil at its end
	lax         int   // 1 + where the sample first has what OpenMetrics refuses; 0 if nowhere
}

// parserOf returns a parser of text in memory, which is empty or ends in a newline.
func parserOf(text []byte, openMetrics bool) parser {
	return parser{window: window{buf: text}, openMetrics: openMetrics}
}

// next finds the next line that says something. It is false at the end of the
// body and at the first fault.
func (p *parser) next() bool {
	for p.err == nil && (p.pos < len(p.buf) || p.more()) {
		p.start = p.pos
		found := p.scan()
		if p.err == errCut {
			p.advance(p.start)
		} else if found {
			return p.err == nil
		}
	}
	return false
}

// more moves the window to the next lines. It is false at the end of the body, where
// it checks for # EOF.
func (p *parser) more() bool {
	if p.src != nil {
		p.advance(p.pos)
	}
	if p.err == nil && p.pos == len(p.buf) && p.openMetrics && p.kind != eofLine {
		p.fail(p.pos, "no # EOF at the end of OpenMetrics: the body may be cut short")
	}
	return p.err == nil && p.pos < len(p.buf)
}

// advance moves the window forward, to begin at from.
func (p *parser) advance(from int) {
	p.err = p.fill(from)
	p.start, p.pos, p.name = 0, 0, nil
}

// scan scans one line and reports whether it says something.
func (p *parser) scan() bool {
	i := p.blanks(p.start)
	switch c := p.buf[i]; {
	case p.kind == eofLine:
		p.fail(i, "more text after # EOF")
	case p.openMetrics && c <= ' ':
		p.fail(p.start, "OpenMetrics allows no empty lines")
	case c == '#':
		return p.comment(i)
	case c == '\n' || c == '\r' && p.buf[i+1] == '\n':
		p.pos = i + bytes.IndexByte(p.buf[i:], '\n') + 1
	default:
		p.pos = p.sample(i) + 1
		return true
	}
	return false
}

// fail ends the body with a fault at i, and returns what its caller is to return.
func (p *parser) fail(i int, fault string) int {
	before := p.buf[:i]
	line := p.passed + bytes.Count(before, []byte("\n")) + 1
	p.err = &syntaxError{line, i - bytes.LastIndexByte(before, '\n'), fault}
	return -1
}

// errCut tells next that the window has only the beginning of the line, because a label
// value holds newlines.
var errCut = errors.New("the line goes on after the window")

// window is the part of a body that is in memory.
type window struct {
	src    io.Reader // nil once it has ended
	buf    []byte    // whole lines
	half   int       // bytes of one more line, which buf has after its length
	passed int       // newlines before the window
}

// fill drops what is before from, and reads until the window is full and has more
// lines than before, or the body has ended.
func (w *window) fill(from int) error {
	w.passed += bytes.Count(w.buf[:from], []byte("\n"))
	buf := w.buf[:len(w.buf)+w.half]
	buf = buf[:copy(buf, buf[from:])]
	had, empty := len(buf)-w.half, 0
	w.buf = buf[:had]
	for w.src != nil && (len(w.buf) == had || len(w.buf)+w.half < cap(w.buf)) {
		n, err := w.read()
		if empty++; n > 0 {
			empty = 0
		}
		switch {
		case err == io.EOF:
			w.src = nil
		case err != nil:
			return err
		case empty == 100:
			return io.ErrNoProgress
		}
	}
	return nil
}

// read reads once, into room that it makes if there is none. It adds a newline to a
// body that does not end in one.
func (w *window) read() (n int, err error) {
	whole, had := len(w.buf), len(w.buf)+w.half
	buf := w.buf[:had]
	if had == cap(buf) {
		buf = slices.Grow(buf, max(had, windowSize))
	}
	n, err = w.src.Read(buf[had:cap(buf)])
	buf = buf[:had+n]
	if err == io.EOF && len(buf) > whole && buf[len(buf)-1] != '\n' {
		buf = append(buf, '\n')
	}
	if i := bytes.LastIndexByte(buf[had:], '\n'); i >= 0 {
		whole = had + i + 1
	}
	w.buf, w.half = buf[:whole], len(buf)-whole
	return n, err
}

// ---- Metadata

// comment scans a line that begins with # and reports whether it is metadata. As in
// Prometheus, metadata has a blank after the #.
func (p *parser) comment(i int) bool {
	end := i + bytes.IndexByte(p.buf[i:], '\n')
	p.pos = end + 1
	if p.openMetrics && string(p.buf[p.start:end]) == "# EOF" {
		p.kind = eofLine
		return false
	}
	word := p.blanks(i + 1)
	name := min(word+len("HELP"), end)
	kind := lineKind(max(0, slices.Index(metadataWords[:], string(p.buf[word:name])))) // 0 for none
	if p.openMetrics {
		if kind == 0 || string(p.buf[p.start:word]) != "# " || p.buf[name] != ' ' {
			p.fail(p.start, "OpenMetrics allows no comments, only # HELP, # TYPE, # UNIT and # EOF")
			return false
		}
		p.metadata(kind, name+1)
		return true
	}
	next := p.blanks(name)
	if kind == 0 || kind == unitLine || word == i+1 || next == name || p.buf[next] == '\n' || p.buf[next] == '\r' {
		return false
	}
	p.metadata(kind, next)
	if kind == helpLine && p.name == nil && p.err != errCut { // no metric can have this name
		p.err = nil
		return false
	}
	return true
}

// metadata scans the metric name at i and what the line says of it. It leaves no name
// after a fault in it.
func (p *parser) metadata(kind lineKind, i int) {
	p.kind, p.name = kind, nil
	if i = p.metricName(i); i < 0 {
		return
	}
	text := p.blanks(i)
	end := i + bytes.IndexByte(p.buf[i:], '\n') // a newline in the quotes is none
	p.pos = end + 1
	if !p.openMetrics && end > i && p.buf[end-1] == '\r' {
		end--
	}
	switch {
	case p.openMetrics && p.buf[i] != ' ', text == i && i != end:
		p.name = nil
		p.fail(i, "unexpected character in a metric name")
		return
	case p.openMetrics || kind == helpLine:
		text = i + 1
	}
	p.text = p.buf[min(text, end):end]
	switch {
	case kind == helpLine && !utf8.Valid(p.text):
		p.fail(text, "invalid UTF-8 in a HELP text")
	case kind == typeLine:
		p.setType(text)
	case kind == unitLine && len(p.text) > 0 && !bytes.HasSuffix(p.name, append([]byte("_"), p.text...)):
		p.fail(text, "the metric name does not end in the unit")
	}
}

// setType sets the type to what the text of a TYPE line, which begins at i, says: in the
// text format to the nearest type that it has.
func (p *parser) setType(i int) {
	word := string(p.text)
	if !p.openMetrics {
		word = strings.ToLower(strings.TrimRight(word, " \t"))
		if word == "" || word == "untyped" {
			word = "unknown"
		}
	}
	t := slices.Index(openMetricsNames[:conflicting], word)
	switch {
	case t < 0:
		p.fail(i, "unknown metric type")
	case p.openMetrics:
		p.metricType = metricType(t)
	default:
		p.metricType = metricType(slices.Index(typeNames[:], typeNames[t]))
	}
}

// ---- Samples

// sample scans the sample at i and returns where its line ends.
func (p *parser) sample(i int) int {
	p.repeated = p.repeatsName(i)
	p.kind, p.plain, p.lax = sampleLine, true, 0
	if i > p.start {
		p.markLax(p.start)
	}
	if i = p.series(i); i < 0 {
		return i
	}
	p.value = p.beforeNumber(i)
	if len(p.stamp)+len(p.exemplar) > 0 {
		p.stamp, p.exemplar, p.quotes = nil, nil, false
	}
	if p.buf[p.value] == '+' && bytes.IndexByte([]byte(".0123456789"), p.buf[p.value+1]) >= 0 {
		p.value++ // VictoriaMetrics drops a line with a +, but for +Inf
		p.plain = false
	}
	i = p.number(p.value)
	if i < 0 || p.buf[i] == '\n' && !p.openMetrics {
		return i
	}
	return p.lineEnd(i)
}

// repeatsName reports whether the name at i is that of the line before, a plain sample.
func (p *parser) repeatsName(i int) bool {
	n := len(p.name)
	return p.kind == sampleLine && p.plain && n > 0 &&
		bytes.HasPrefix(p.buf[i:], p.name) && class[p.buf[i+n]]&nameByte == 0
}

// series scans the name and the labels of a sample: name, name{…}, {"name",…}.
func (p *parser) series(i int) int {
	p.labels = p.labels[:0]
	switch {
	case p.repeated:
		i += len(p.name)
	case p.buf[i] == '{':
		p.name = nil
	default:
		if i = p.bareName(i); i < 0 {
			return i
		}
	}
	open := p.blanks(i)
	switch {
	case p.buf[open] != '{' && open == i:
		return p.fail(i, "unexpected character in a metric name")
	case p.buf[open] != '{':
		return i
	case open > i:
		p.markLax(i)
	}
	i = p.labelSet(open+1, true)
	switch {
	case i < 0:
		return i
	case p.name == nil:
		return p.fail(i, "no metric name before or in the braces")
	case len(p.labels) >= fewLabels && p.repeatsLabel():
		return p.fail(open+1, "duplicate label name")
	}
	return i
}

// metricName scans the metric name in a line of metadata.
func (p *parser) metricName(i int) int {
	if p.buf[i] != '"' {
		return p.bareName(i)
	}
	end := p.quotedName(i, false)
	if end >= 0 {
		p.name = respelled(p.buf[i+1 : end-1])
	}
	return end
}

// bareName scans a metric name without quotes.
func (p *parser) bareName(i int) int {
	name := i
	for i = labelBytes(p.buf, i); class[p.buf[i]]&nameByte != 0; {
		i++
	}
	if i == name || class[p.buf[name]]&digit != 0 {
		return p.fail(name, p.notAName(name))
	}
	p.name = p.buf[name:i]
	return i
}

// notAName guesses what stands at i in place of a metric name.
func (p *parser) notAName(i int) string {
	switch rest := p.buf[i:]; {
	case bytes.HasPrefix(rest, []byte("\xef\xbb\xbf")):
		return "byte order mark: save the text without it"
	case rest[0] == '<':
		return "expected a metric name; this looks like HTML"
	case rest[0] == 0:
		return "NUL byte"
	}
	return "expected a metric name"
}

// quotedName scans a quoted name. As in Prometheus, it may have a newline in OpenMetrics, too.
func (p *parser) quotedName(i int, mayBeEmpty bool) int {
	name, lax := i+1, p.lax
	i = p.labelValue(name)
	p.plain, p.lax = false, lax
	switch {
	case i < 0:
		return i
	case i == name && !mayBeEmpty:
		return p.fail(name, "empty name")
	case bytes.IndexByte(p.buf[name:i], 0) >= 0:
		return p.fail(name, "NUL byte")
	}
	return i + 1
}

// labelSet scans labels and the closing brace; with keep it adds them to the sample.
// Each label may be followed by one comma, and need not be.
func (p *parser) labelSet(i int, keep bool) int {
	for first := true; i >= 0; first = false {
		i = p.gap(i)
		comma := p.buf[i] == ',' && !first
		if comma {
			i = p.gap(i + 1)
		}
		if p.buf[i] == '}' {
			p.plain = p.plain && !first && !comma
			return i + 1
		}
		if !first && !comma {
			p.markLax(i)
		}
		from := i
		if keep {
			i = p.plainLabels(i)
		}
		if i == from {
			i = p.label(i, keep)
		}
	}
	return i
}

// plainLabels scans labels that are written name="value", with nothing but a comma between
// them, as nearly all are. It returns the index after the last one that label need not look at.
func (p *parser) plainLabels(i int) int {
	end, b, labels, seen := i, p.buf, p.labels, p.seen()
	for len(labels) < fewLabels {
		equals := labelBytes(b, i)
		if equals == i || b[equals] != '=' || b[equals+1] != '"' || class[b[i]]&digit != 0 || b[i] == '_' {
			break
		}
		bit := nameBit(b[i:equals])
		quote := valueBytes(b, equals+2)
		for b[quote] == '\\' && isEscape(b[quote+1]) {
			quote = valueBytes(b, quote+2)
		}
		if b[quote] != '"' || seen&bit != 0 {
			break
		}
		seen, end = seen|bit, quote+1
		labels = append(labels, label{})
		l := &labels[len(labels)-1] // to append it filled takes longer
		l.name, l.nameEnd = int32(i-p.start), int32(equals-p.start)
		l.value, l.end, l.seen = int32(equals+2-p.start), int32(end-p.start), seen
		if b[end] != ',' {
			break
		}
		i = end + 1
	}
	p.labels = labels
	return end
}

// label scans one label, or the quoted metric name among the labels; with keep it
// adds the label to the sample.
func (p *parser) label(i int, keep bool) int {
	name, nameEnd, quoted := i, i, p.buf[i] == '"'
	if quoted {
		if i = p.quotedName(i, !keep); i < 0 {
			return i
		}
		name, nameEnd = name+1, i-1
		p.quotes = p.quotes || !keep
	} else {
		i = labelBytes(p.buf, i)
		if nameEnd = i; i == name || class[p.buf[name]]&digit != 0 {
			return p.fail(name, "expected a label name")
		}
	}
	if i = p.gap(i); p.buf[i] != '=' {
		if p.name != nil || !quoted {
			return p.fail(i, "expected = after a label name")
		}
		p.name = respelled(p.buf[name:nameEnd])
		return i
	}
	if i = p.gap(i + 1); p.buf[i] != '"' {
		return p.fail(i, "expected a quoted label value")
	}
	value := i + 1
	if i = p.labelValue(value); i < 0 {
		return i
	}
	if keep {
		return p.addLabel(name, nameEnd, value, i+1)
	}
	return i + 1
}

// addLabel adds a label to the sample, unless its name is reserved or there already.
func (p *parser) addLabel(name, nameEnd, value, end int) int {
	text := p.buf[name:nameEnd]
	if !p.plain {
		text = respelled(text)
	}
	seen, bit := p.seen(), nameBit(text)
	switch n := len(p.labels); {
	case seen&bit != 0 && n < fewLabels && p.labelNamed(text) != nil:
		return p.fail(name, "duplicate label name")
	case string(text) == "__name__":
		return p.fail(name, "the label name __name__ is reserved")
	case n == maxLabels:
		return p.fail(name, fmt.Sprintf("more than %d labels", maxLabels))
	}
	p.labels = append(p.labels, label{
		name: int32(name - p.start), nameEnd: int32(nameEnd - p.start),
		value: int32(value - p.start), end: int32(end - p.start),
		seen: seen | bit,
	})
	return end
}

// labelValue scans a label value and returns where its closing quote stands.
func (p *parser) labelValue(i int) int {
	b := p.buf
	value, ascii := i, true
	for {
		i = valueBytes(b, i)
		if i >= len(b) && p.src != nil { // next scans the line again, with more of it
			p.err = errCut
			return -1
		}
		if i >= len(b) {
			return p.fail(value-1, "unclosed quote")
		}
		switch c := b[i]; {
		case c == '"':
			if !ascii && !utf8.Valid(b[value:i]) {
				return p.fail(value, "invalid UTF-8 in quotes")
			}
			return i
		case c == '\\':
			if isEscape(b[i+1]) {
				i++
			} else {
				p.plain = false
			}
		case c == '\n':
			p.markLax(i)
		case c >= utf8.RuneSelf:
			ascii = false
		}
		i++
	}
}

// ---- Values and what follows them

// beforeNumber scans the blanks before a value.
func (p *parser) beforeNumber(i int) int {
	if p.buf[i] == ' ' {
		return p.gap(i + 1)
	}
	p.markLax(i)
	return p.blanks(i)
}

// number scans a number. Its own pass takes what exporters write, and leaves the rest
// and all that could overflow to isOddNumber.
func (p *parser) number(i int) int {
	b := p.buf
	j := i
	if b[j] == '-' {
		j++
	}
	from := j
	j = digits(b, j)
	n := j - from
	if b[j] == '.' {
		from = j + 1
		j = digits(b, from)
		n += j - from
	}
	if b[j] == 'e' {
		j++
		if b[j] == '+' || b[j] == '-' {
			j++
		}
		from = j
		j = digits(b, j)
		if j == from || j-from > 2 {
			n = 0
		}
	}
	if n > 0 && n < 100 && b[j] <= ' ' {
		return j
	}
	j = wordEnd(b, i)
	if !isOddNumber(b[i:j]) {
		return p.fail(i, "expected a number as the value")
	}
	return j
}

// lineEnd scans what may stand between the value of a sample and the newline, and
// returns where that is.
func (p *parser) lineEnd(i int) int {
	if p.openMetrics {
		if i = p.seconds(i); i >= 0 {
			i = p.scanExemplar(i)
		}
	} else {
		i = p.timestamp(i)
	}
	if i < 0 {
		return i
	}
	end := p.blanks(i)
	if p.buf[end] == '\r' {
		end++
	}
	if end > i {
		p.markLax(i)
	}
	if p.buf[end] != '\n' {
		return p.fail(end, "expected the end of the line or a timestamp (digits only) after the value")
	}
	if p.openMetrics && p.lax > 0 {
		return p.fail(p.lax-1, "OpenMetrics wants one blank before a value or timestamp and no others, "+
			"commas between labels, and no newline in a label value")
	}
	return end
}

// timestamp scans a timestamp and the blanks before it, if there is one.
func (p *parser) timestamp(i int) int {
	b := p.buf
	stamp := p.blanks(i)
	if class[b[stamp]]&digit == 0 {
		return i
	}
	p.plain = p.plain && stamp == i+1 && b[i] == ' '
	end := digits(b, stamp)
	p.stamp = b[stamp:end]
	if end-stamp > 18 {
		if _, err := strconv.ParseInt(string(p.stamp), 10, 64); err != nil {
			return p.fail(stamp, "the timestamp does not fit in 64 bits")
		}
	}
	return end
}

// seconds scans a timestamp of OpenMetrics, if there is one.
func (p *parser) seconds(i int) int {
	if p.buf[i] != ' ' || p.buf[i+1] == '#' {
		return i
	}
	end := p.finite(i + 1)
	if end >= 0 {
		p.stamp = p.buf[i+1 : end]
	}
	return end
}

// finite scans what OpenMetrics has for a timestamp: any number but NaN and infinity.
func (p *parser) finite(i int) int {
	end := p.number(i)
	if end < 0 || bytes.ContainsAny(p.buf[i:end], "nN") {
		return p.fail(i, "expected a timestamp in seconds")
	}
	return end
}

// scanExemplar scans the exemplar after a sample, if there is one. As in Prometheus, its
// labels may have any names, also the same twice.
func (p *parser) scanExemplar(i int) int {
	if !bytes.HasPrefix(p.buf[i:], []byte(" # {")) {
		return i
	}
	start, plain := i+1, p.plain
	if i = p.labelSet(i+len(" # {"), false); i >= 0 {
		i = p.number(p.beforeNumber(i))
	}
	if i >= 0 && p.buf[i] == ' ' {
		i = p.finite(i + 1)
	}
	if i < 0 {
		return i
	}
	p.exemplar, p.plain = p.buf[start:i], plain
	if n := bytes.IndexAny(p.exemplar, "\n\x00"); n >= 0 {
		return p.fail(start+n, "newline or NUL byte in an exemplar")
	}
	return i
}

// gap skips blanks where a plain line has none.
func (p *parser) gap(i int) int {
	if c := p.buf[i]; c != ' ' && c != '\t' {
		return i
	}
	p.markLax(i)
	return p.blanks(i)
}

// markLax notes that the sample has at i what only the text format allows, and what its
// own encoder would not write.
func (p *parser) markLax(i int) {
	p.plain = false
	if p.lax == 0 {
		p.lax = i + 1
	}
}

// blanks skips blanks.
func (p *parser) blanks(i int) int {
	for p.buf[i] == ' ' || p.buf[i] == '\t' {
		i++
	}
	return i
}

// ---- Parts of a sample

// repeatsLabel reports whether two labels of the sample have one name.
func (p *parser) repeatsLabel() bool {
	same := func(a, b label) bool { return bytes.Equal(p.labelName(a), p.labelName(b)) }
	return len(slices.CompactFunc(p.byName(), same)) < len(p.labels)
}

// byName returns the labels of the sample in the order of their names. It sorts a copy
// that stands after the labels in their array, so that none is allocated per sample.
func (p *parser) byName() []label {
	n := len(p.labels)
	both := append(p.labels, p.labels...)
	p.labels = both[:n]
	slices.SortFunc(both[n:], func(a, b label) int {
		return bytes.Compare(p.labelName(a), p.labelName(b))
	})
	return both[n:]
}

// seen returns the bits of all label names of the sample, see nameBit.
func (p *parser) seen() uint64 {
	if n := len(p.labels); n > 0 {
		return p.labels[n-1].seen
	}
	return 0
}

// labelName returns the name of a label of the sample, without its quotes.
func (p *parser) labelName(l label) []byte {
	name := p.buf[p.start+int(l.name) : p.start+int(l.nameEnd)]
	if p.plain {
		return name
	}
	return respelled(name)
}

// labelText returns the value of a label of the sample, as written.
func (p *parser) labelText(l label) []byte {
	return p.buf[p.start+int(l.value) : p.start+int(l.end)-1]
}

// labelNamed returns the value of the label of that name, as written; nil if there is none.
func (p *parser) labelNamed(name []byte) []byte {
	for _, l := range p.labels {
		if bytes.Equal(p.labelName(l), name) {
			return p.labelText(l)
		}
	}
	return nil
}

// valueText returns the value of the sample, as written.
func (p *parser) valueText() []byte { return p.buf[p.value:wordEnd(p.buf, p.value)] }

// tail returns what follows the name of a plain sample and its brace, newline included.
func (p *parser) tail() []byte {
	i := p.start + len(p.name)
	if len(p.labels) > 0 {
		i += len("{")
	}
	return p.buf[i:p.pos]
}

// ---- Bytes

// respelled returns a quoted name in the one spelling that can be compared: a newline is
// escaped, and so is a backslash that begins no escape.
func respelled(name []byte) []byte {
	if bytes.IndexByte(name, '\\') < 0 && bytes.IndexByte(name, '\n') < 0 {
		return name
	}
	return appendRespelled(nil, name, `\"n`)
}

// nameBit maps a label name to one of 64 bits: names of different bits differ.
func nameBit(name []byte) uint64 {
	n := len(name)
	return 1 << ((int(name[0]) + 3*int(name[n-1]) + 11*n) & 63)
}

// wordEnd returns the index of the first blank or control character from i on.
func wordEnd(b []byte, i int) int {
	for b[i] > ' ' {
		i++
	}
	return i
}

// digits returns the index after the digits at i.
func digits(b []byte, i int) int {
	for len(b)-i >= 8 {
		x := binary.LittleEndian.Uint64(b[i : i+8])
		if m := ((x ^ ones*'0') + ones*(0x80-10) | x) & highs; m != 0 {
			return i + bits.TrailingZeros64(m)/8
		}
		i += 8
	}
	for class[b[i]]&digit != 0 {
		i++
	}
	return i
}

// labelBytes returns the index after the letters, digits and underscores at i.
func labelBytes(b []byte, i int) int {
	for len(b)-i >= 8 {
		if m := notLabel(binary.LittleEndian.Uint64(b[i : i+8])); m != 0 {
			return i + bits.TrailingZeros64(m)/8
		}
		i += 8
	}
	for class[b[i]]&labelByte != 0 {
		i++
	}
	return i
}

// valueBytes returns the index after bytes at i that mean themselves in a label value; there
// may be up to seven more of them where b ends.
func valueBytes(b []byte, i int) int {
	for len(b)-i >= 8 {
		if m := special(binary.LittleEndian.Uint64(b[i : i+8])); m != 0 {
			return i + bits.TrailingZeros64(m)/8
		}
		i += 8
	}
	return i
}

// ones times a byte is that byte eight times; highs are the high bits of all eight.
const ones, highs = 0x0101010101010101, 0x8080808080808080

// notLabel sets the high bit of each byte of x that no label name has.
func notLabel(x uint64) uint64 {
	y := x &^ highs
	lower := y | ones*0x20
	letter := (lower + ones*(0x80-'a')) &^ (lower + ones*(0x80-'z'-1))
	digit := (y + ones*(0x80-'0')) &^ (y + ones*(0x80-'9'-1))
	other := (y ^ ones*'_') + ones*0x7f
	return (other&^letter&^digit | x) & highs
}

// special sets the high bit of each byte of x that is a quote, a backslash, a
// control character or not ASCII. Bytes above the lowest such one may be wrong.
func special(x uint64) uint64 {
	quote := x ^ ones*'"'
	backslash := x ^ ones*'\\'
	return ((x-ones*' ')&^x | (quote-ones)&^quote | (backslash-ones)&^backslash | x) & highs
}

// Classes of bytes in names and numbers.
const (
	digit     = 1 << iota
	labelByte // of a label name
	nameByte  // of a metric name
)

var class = func() (t [256]uint8) {
	for c := range t {
		switch {
		case '0' <= c && c <= '9':
			t[c] = digit | labelByte | nameByte
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '_':
			t[c] = labelByte | nameByte
		case c == ':':
			t[c] = nameByte
		}
	}
	return t
}()

// ---- Predicates

// isEscape reports whether a backslash and c make an escape in a label value.
func isEscape(c byte) bool {
	return c == '\\' || c == '"' || c == 'n'
}

// isBareLabel reports whether name needs no quotes as a label name.
func isBareLabel(name []byte) bool {
	return isBareName(name) && bytes.IndexByte(name, ':') < 0
}

// isBareName reports whether name needs no quotes as a metric name.
func isBareName(name []byte) bool {
	for _, c := range name {
		if class[c]&nameByte == 0 {
			return false
		}
	}
	return len(name) > 0 && class[name[0]]&digit == 0
}

// isNumber reports whether a word is a number, as a bound of a bucket is.
func isNumber(word []byte) bool {
	points := 0
	for _, c := range word {
		if c == '.' {
			points++
		} else if class[c]&digit == 0 {
			return string(word) == "+Inf" || isOddNumber(word)
		}
	}
	return points < 2 && points < len(word) && len(word) < 100 || isOddNumber(word)
}

// isOddNumber reports whether a word is a number, however it is written. It refuses
// hexadecimal digits and underscores, which Go allows and the format does not.
func isOddNumber(word []byte) bool {
	_, err := strconv.ParseFloat(string(word), 64)
	return err == nil && !bytes.ContainsAny(word, "_xX")
}
