// This file turns one body of the Prometheus text format, of OpenMetrics or of protobuf into an
// exposition: its lines with the labels of their source, by metric family.
//
// The parser finds the lines. Its states follow in the order of the grammar: each takes the index in the window at
// which it begins, and returns the index after what it scanned, or -1 after a fault. A labeller appends what the
// parser finds to an exposition, which never changes again, and writes what a page of another format has otherwise.
//
// Names, labels and values are slices of the window: nothing is allocated per line, and
// nothing is copied but quoted names that have to be respelled. Of text, the window ends in a
// newline, so loops that skip one kind of byte need not look for its end.
//
// The text format is read as leniently as Prometheus reads it, or more so where the meaning is clear; OpenMetrics
// as strictly as Prometheus reads it: one blank where blanks belong, no comments, no empty lines.

package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math"
	"math/bits"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"
)

// ---- Lines

const (
	windowSize = 64 << 10 // bytes that a parser reads at once
	maxLabels  = 1 << 16  // labels that one sample may have, with those that are added
	fewLabels  = 32       // fewer labels are compared one by one; from here on, sorting is faster
)

// lineKind tells which fields and methods of a parser belong to the line.
type lineKind uint8

const (
	// sampleLine has name, labels, valueText, stamp, exemplar, repeated and plain, or is a metric of protobuf,
	// with labels, samples and isNative.
	sampleLine lineKind = iota
	helpLine            // name, text
	typeLine            // name, metricType
	unitLine            // name, text
	eofLine             // checked, but not handed out
	headLine            // name, text, metricType, unit: what a message of protobuf says of its metrics
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
	unknown     // untyped, whatever its samples are named
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
	seen       uint64 // the bits of the label names, see nameBit
	value      int    // where the value begins in the window, or what a metric of protobuf consists of
	stamp      []byte // timestamp as written: milliseconds, in OpenMetrics seconds; empty if there is none
	exemplar   []byte // as written, from the # on; empty if there is none
	quotes     bool   // a label name of the exemplar, or in protobuf of the metric, needs quotes
	repeated   bool   // the line before was a sample of this name; may be missed
	plain      bool   // it is written as the format's own encoder would
}

// label is where one label of a sample stands, in bytes from the start of the line.
type label struct {
	name, nameEnd int32
	value, end    int32 // end is after the closing quote, in protobuf one after the value
}

// A syntaxError says where a body breaks the format, and how.
type syntaxError struct {
	line, column int    // from 1; the column counts bytes, in protobuf from the start of the body
	text         string // the beginning of the line
	fault        string
}

func (e *syntaxError) Error() string {
	if e.line == 0 { // of protobuf
		return fmt.Sprintf("byte %d: %s", e.column, e.fault)
	}
	shown := strings.TrimPrefix(fmt.Sprintf("%.80q: ", e.text), `"": `)
	return fmt.Sprintf("line %d, column %d: %s%s", e.line, e.column, shown, e.fault)
}

// resemblances are what a bad line may be instead, by its beginning and what else it has.
var resemblances = []struct{ begins, has, what string }{
	{"<", "", "this looks like HTML"},
	{"[", "", "this looks like JSON"},
	{"{", "\":", "this looks like JSON"},
	{"{\n", "", "this looks like JSON"},
	{"\x1f\x8b", "", "this is gzip, and nothing says so"},
	{"\ufeff", "", "it begins with a byte order mark"},
	{"\xff\xfe", "", "is it UTF-16? It must be UTF-8"},
	{"\xfe\xff", "", "is it UTF-16? It must be UTF-8"},
}

// ---- The parser

// parser finds the lines of one body. Set the src of a zero parser, call next until
// it is false, then look at err. The slices of a line are good until the next call.
type parser struct {
	window
	line
	message
	err   error // what ended the body; nil at its end
	lax   int   // 1 + where the sample first has what OpenMetrics refuses; 0 if nowhere
	added int   // labels that each sample will have beside its own
}

// parserOf returns a parser of lines in memory: text that is empty or ends in a newline, or metrics.
func parserOf(lines []byte, f format) parser {
	return parser{window: window{buf: lines, format: f}, message: message{end: len(lines)}}
}

// next finds the next line that says something. It is false at the end of the body and at the first fault.
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

// more moves the window to the next lines. It is false at the end of the body, where it checks for # EOF.
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
	p.start, p.pos, p.end, p.name = 0, 0, 0, nil
}

// scan scans one line and reports whether it says something.
func (p *parser) scan() bool {
	if p.protobuf {
		return p.scanMessage()
	}
	i := p.blanks(p.start)
	switch c := p.buf[i]; {
	case p.kind == eofLine:
		p.fail(i, "more text after # EOF")
	case c == '#':
		return p.comment(i)
	case c != '\n' && (c != '\r' || p.buf[i+1] != '\n'):
		p.pos = p.sample(i) + 1
		return true
	case p.openMetrics:
		p.fail(p.start, "OpenMetrics allows no empty lines")
	default:
		p.pos = i + bytes.IndexByte(p.buf[i:], '\n') + 1
	}
	return false
}

// fail ends the body with a fault at i, and returns what its caller is to return.
func (p *parser) fail(i int, fault string) int {
	if p.protobuf {
		p.err = &syntaxError{column: p.passed + i, fault: fault}
		return -1
	}
	before := p.buf[:i]
	line := p.passed + bytes.Count(before, []byte("\n")) + 1
	start := bytes.LastIndexByte(before, '\n') + 1
	text := string(p.buf[start:min(start+1<<10, len(p.buf))])
	for _, r := range resemblances {
		if strings.HasPrefix(text, r.begins) && strings.Contains(text, r.has) {
			fault += "; " + r.what
			break
		}
	}
	text, _, _ = strings.Cut(text, "\n")
	p.err = &syntaxError{line, i - start + 1, text, fault}
	return -1
}

// errCut tells next that the window has only the beginning of a message, or of a line with newlines in quotes.
var errCut = errors.New("the line goes on after the window")

// window is the part of a body that is in memory.
type window struct {
	format
	src    io.Reader // nil once it has ended
	buf    []byte    // whole lines; of protobuf, all that there is
	half   int       // bytes of one more line, which buf has after its length
	passed int       // newlines before the window; of protobuf, bytes
}

// fill drops what is before from, and reads until the window is full and has more lines than
// before, or the body has ended. It adds a newline to a body that does not end in one.
func (w *window) fill(from int) error {
	if w.protobuf {
		w.passed += from
	} else {
		w.passed += bytes.Count(w.buf[:from], []byte("\n"))
	}
	buf := w.buf[:len(w.buf)+w.half]
	buf = buf[:copy(buf, buf[from:])]
	had, empty := len(buf)-w.half, 0
	w.buf = buf[:had]
	for w.src != nil && (len(w.buf) == had || len(buf) < cap(buf)) {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, max(len(buf), windowSize))
		}
		whole, read := len(w.buf), len(buf)
		n, err := w.src.Read(buf[read:cap(buf)])
		buf = buf[:read+n]
		if empty++; n > 0 {
			empty = 0
		}
		switch {
		case err == io.EOF:
			w.src = nil
			if len(buf) > whole && buf[len(buf)-1] != '\n' && !w.protobuf {
				buf = append(buf, '\n')
			}
		case err != nil:
			return err
		case empty == 100:
			return io.ErrNoProgress
		}
		if w.protobuf {
			whole = len(buf)
		} else if i := bytes.LastIndexByte(buf[read:], '\n'); i >= 0 {
			whole = read + i + 1
		}
		w.buf, w.half = buf[:whole], len(buf)-whole
	}
	return nil
}

// ---- Metadata

// comment reports whether a line that begins with # is metadata: as in Prometheus, with a blank after the #.
func (p *parser) comment(i int) bool {
	end := i + bytes.IndexByte(p.buf[i:], '\n')
	p.pos = end + 1
	if p.openMetrics && string(p.buf[p.start:end]) == "# EOF" {
		p.kind = eofLine
		return false
	}
	word := p.blanks(i + 1)
	name := min(word+len("HELP"), end)
	kind := lineKind(max(0, slices.Index(metadataWords[:], string(p.buf[word:name])))) // or sampleLine
	if p.openMetrics {
		if kind == sampleLine || string(p.buf[p.start:word]) != "# " || p.buf[name] != ' ' {
			p.fail(p.start, "OpenMetrics allows no comments, only # HELP, # TYPE, # UNIT and # EOF")
			return false
		}
		p.metadata(kind, name+1)
		return true
	}
	next := p.blanks(name)
	if kind == sampleLine || kind == unitLine || word == i+1 ||
		next == name || p.buf[next] == '\n' || p.buf[next] == '\r' {
		return false
	}
	p.metadata(kind, next)
	if kind == helpLine && p.name == nil && p.err != errCut { // no metric can have this name
		p.err = nil
		return false
	}
	return true
}

// metadata scans the metric name at i and what the line says of it. It leaves no name after a fault in it.
func (p *parser) metadata(kind lineKind, i int) {
	p.kind, p.name = kind, nil
	if name := i + 1; p.buf[i] != '"' {
		i = p.bareName(i)
	} else if i = p.quotedName(i, false); i >= 0 {
		p.name = respelled(p.buf[name : i-1])
	}
	if i < 0 {
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

// setType sets the type that the text of a TYPE line at i says: in the text format the nearest that it has.
func (p *parser) setType(i int) {
	word := string(p.text)
	if !p.openMetrics {
		word = strings.ToLower(strings.TrimRight(word, " \t"))
		if word == "" || word == "untyped" {
			word = "unknown"
		}
	}
	t := slices.Index(openMetricsNames[:conflicting], word)
	if t < 0 {
		p.fail(i, "unknown metric type")
	} else if !p.openMetrics {
		t = slices.Index(typeNames[:], typeNames[t])
	}
	p.metricType = metricType(t)
}

// ---- Samples

// sample scans the sample at i and returns where its line ends.
func (p *parser) sample(i int) int {
	n := len(p.name)
	p.repeated = p.kind == sampleLine && p.plain && n > 0 &&
		bytes.HasPrefix(p.buf[i:], p.name) && class[p.buf[i+n]]&nameByte == 0
	p.kind, p.plain, p.lax = sampleLine, true, 0
	if i > p.start {
		p.markLax(p.start)
	}
	if i = p.series(i); i < 0 {
		return i
	}
	p.value = p.beforeNumber(i)
	p.stamp, p.exemplar, p.quotes = nil, nil, false
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

// series scans the name and the labels of a sample: name, name{…}, {"name",…}.
func (p *parser) series(i int) int {
	p.labels, p.seen = p.labels[:0], 0
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
	case p.buf[i] == ',':
		return p.fail(i, "a comma after a metric name; this looks like a line of InfluxDB")
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

// bareName scans a metric name without quotes.
func (p *parser) bareName(i int) int {
	name, b := i, p.buf
	for class[b[i]]&nameByte != 0 {
		i++
	}
	if i == name || class[p.buf[name]]&digit != 0 {
		return p.fail(name, "expected a metric name")
	}
	p.name = p.buf[name:i]
	return i
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
		i = p.label(i, keep)
	}
	return i
}

// label scans one label, or the quoted metric name among the labels; with keep it adds the label to the sample.
func (p *parser) label(i int, keep bool) int {
	b := p.buf
	name, nameEnd, quoted := i, i, b[i] == '"'
	if quoted {
		if i = p.quotedName(i, !keep); i < 0 {
			return i
		}
		name, nameEnd = name+1, i-1
		p.quotes = p.quotes || !keep
	} else {
		for class[b[i]]&labelByte != 0 {
			i++
		}
		if nameEnd = i; i == name || class[b[name]]&digit != 0 {
			return p.fail(name, "expected a label name or }")
		}
	}
	if i = p.gap(i); b[i] != '=' {
		if p.name != nil || !quoted {
			return p.fail(i, "expected = after a label name")
		}
		p.name = respelled(b[name:nameEnd])
		return i
	}
	if i = p.gap(i + 1); b[i] != '"' {
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
	bit := nameBit(text)
	switch n := len(p.labels); {
	case p.seen&bit != 0 && n < fewLabels && p.labelNamed(text) != nil:
		return p.fail(name, "duplicate label name")
	case string(text) == "__name__":
		return p.fail(name, "the label name __name__ is reserved")
	case n+p.added >= maxLabels:
		return p.fail(name, fmt.Sprintf("more than %d labels", n))
	}
	p.labels, p.seen = append(p.labels, label{}), p.seen|bit
	l := &p.labels[len(p.labels)-1] // to append it filled takes longer
	l.name, l.nameEnd = int32(name-p.start), int32(nameEnd-p.start)
	l.value, l.end = int32(value-p.start), int32(end-p.start)
	return end
}

// labelValue scans a label value and returns where its closing quote stands.
func (p *parser) labelValue(i int) int {
	b := p.buf
	value, ascii := i, true
	for {
		for i < len(b) && class[b[i]]&valueByte != 0 {
			i++
		}
		if i == len(b) && p.src != nil { // next scans the line again, with more of it
			p.err = errCut
			return -1
		}
		if i == len(b) {
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

// ---- Values

// beforeNumber scans the blanks before a value.
func (p *parser) beforeNumber(i int) int {
	if p.buf[i] == ' ' {
		return p.gap(i + 1)
	}
	p.markLax(i)
	return p.blanks(i)
}

// number scans a number. A plain one that cannot overflow is checked here; isNumber checks all others, slowly.
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
	if !isNumber(b[i:j]) {
		return p.fail(i, "expected a number as the value")
	}
	return j
}

// lineEnd scans what may stand between the value of a sample and the newline, and returns where that is.
func (p *parser) lineEnd(i int) int {
	switch {
	case !p.openMetrics:
		i = p.timestamp(i)
	case p.buf[i] == ' ' && p.buf[i+1] != '#':
		stamp := i + 1
		if i = p.finite(stamp); i >= 0 {
			p.stamp = p.buf[stamp:i]
		}
	}
	if i >= 0 && p.openMetrics {
		i = p.scanExemplar(i)
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

// finite scans what OpenMetrics has for a timestamp: any number but NaN and infinity.
func (p *parser) finite(i int) int {
	end := p.number(i)
	if end < 0 || bytes.ContainsAny(p.buf[i:end], "nN") {
		return p.fail(i, "expected a timestamp in seconds")
	}
	return end
}

// scanExemplar scans the exemplar that there may be. As in Prometheus, it may have any labels, also one twice.
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

// markLax notes that the sample has at i what only the text format allows, but no encoder writes.
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

// labelName returns the name of a label of the sample, without its quotes.
func (p *parser) labelName(l label) []byte {
	name := p.buf[p.start+int(l.name) : p.start+int(l.nameEnd)]
	if p.plain {
		return name
	}
	return respelled(name)
}

// labelText returns the value of a label of the sample, as written.
func (p *parser) labelText(l label) []byte { return p.buf[p.start+int(l.value) : p.start+int(l.end)-1] }

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

// ---- Protobuf

// message is what a parser knows of a message of protobuf, and of the last metric in it. A body is a row of
// messages, each after its length, with one metric family each (io.prometheus.client.MetricFamily). They are
// checked, as a broken one would cost the page, but metrics are handed on as they came.
type message struct {
	end        int    // where the message ends in the window
	unit       []byte // of the metric family
	samples    int    // that Prometheus makes of the metric
	isInfinite bool   // there is a bucket of +Inf
	isNative   bool   // the metric is a native histogram
}

// protobufTypes are the types of metric families, by their numbers in protobuf.
var protobufTypes = [...]metricType{counter, gauge, summary, untyped, histogram, gaugeHistogram}

// valueFields are the numbers of the fields that hold the value of a metric, by its type.
var valueFields = [conflicting]int{untyped: 5, counter: 3, gauge: 2, summary: 4, histogram: 7, gaugeHistogram: 7}

// boundLabels are the labels that bound a bucket or a quantile.
var boundLabels = [conflicting]string{histogram: "le", gaugeHistogram: "le", summary: "quantile"}

// fieldTypes has for each message the types of its fields, by number: v is an integer, f a float, i and d are any
// number of integers and floats, s is text, a capital letter a message, m one that is left alone, a blank anything.
var fieldTypes = [...]string{
	'F': " ssvms", 'M': " LGCSGvH", 'L': " ss", // MetricFamily, Metric, LabelPair
	'G': " f", 'C': " fET", 'S': " vfQT", 'Q': " ff", // Gauge and Untyped, Counter, Summary, Quantile
	'H': " vfBfvfvfPidPidTE", 'B': " vfEf", 'P': " vv", // Histogram, Bucket, BucketSpan
	'E': " LfT", 'T': " vv", // Exemplar, Timestamp
}

// The ways in which a field is written, and for each type a bit for those that it may have.
const varintWire, fixed64Wire, bytesWire, fixed32Wire = 0, 1, 2, 5

var wires = ['z']byte{' ': 39, 'v': 1, 'i': 5, 'f': 2, 'd': 6, 's': 4, 'm': 4,
	'B': 4, 'C': 4, 'E': 4, 'G': 4, 'H': 4, 'L': 4, 'P': 4, 'Q': 4, 'S': 4, 'T': 4}

// scanMessage scans the head of a message or its next metric, and reports whether it found one.
func (p *parser) scanMessage() bool {
	if p.pos == p.end {
		return p.head()
	}
	p.kind, p.plain, p.quotes, p.labels, p.seen = sampleLine, true, false, p.labels[:0], 0
	p.message = message{end: p.end}
	fieldType, _, from, to := p.field('F', p.pos, p.end)
	p.value, p.pos = from, to
	if p.err != nil || fieldType != 'm' {
		return false
	}
	found, bound := p.walk('M', from, to), boundLabels[p.metricType]
	p.samples += 2
	if bound == "" || p.isNative {
		p.samples = 1
	} else if bound == "le" && !p.isInfinite {
		p.samples++
	}
	switch {
	case p.err != nil:
	case p.samples != 2 && p.labelNamed([]byte(bound)) != nil, len(p.labels) >= fewLabels && p.repeatsLabel():
		p.fail(from, "duplicate label name")
	case found[valueFields[p.metricType]].from == 0: // Prometheus would take that of the metric before
		p.fail(from, "expected a value of the family's type")
	}
	return true
}

// head scans the length of a message and what it says of its metrics. It is false if it has none.
func (p *parser) head() bool {
	size, n := binary.Uvarint(p.buf[p.start:])
	from := p.start + max(n, 0)
	switch isCut := n == 0 || size > uint64(len(p.buf)-from); {
	case isCut && p.src != nil: // next scans it again, with more of it
		p.err = errCut
		return false
	case isCut || n < 0 || n > binary.MaxVarintLen32:
		p.fail(p.start, "expected the length of a message, and then so many bytes")
		return false
	}
	p.kind, p.pos, p.end = headLine, from, from+int(size)
	found := p.walk('F', from, p.end)
	text := func(s span) []byte { return p.buf[s.from:s.to] }
	p.name, p.text, p.unit = text(found[1]), text(found[2]), text(found[5])
	number := p.integer(found[3])
	switch {
	case p.err != nil:
	case len(p.name) == 0 || number >= uint64(len(protobufTypes)):
		p.fail(from, "expected the name and the type of a metric family")
	case found[4].from == 0:
		p.pos = p.end
	default:
		p.metricType = protobufTypes[number]
		return true
	}
	return false
}

// field finds the contents of the field at i of a message, and checks that it is written as its type is.
func (p *parser) field(message byte, i, end int) (fieldType byte, number, from, to int) {
	tag, from := p.varint(i, end)
	size, wire := uint64(8), int(tag&7)
	switch {
	case p.err != nil || wire == fixed64Wire:
	case wire == varintWire:
		_, to = p.varint(from, end)
		size = uint64(to - from)
	case wire == bytesWire:
		size, from = p.varint(from, end)
	case wire == fixed32Wire:
		size = 4
	}
	fieldType, number = ' ', int(tag>>3)
	if types := fieldTypes[message]; number < len(types) {
		fieldType = types[number]
	}
	switch {
	case p.err != nil:
	case tag < 1<<3 || tag >= 1<<32 || wires[fieldType]>>wire&1 == 0 || fieldType == 'd' && size%8 != 0:
		p.fail(i, "expected a field of another type")
	case size > uint64(end-from):
		p.fail(i, "expected a field that ends before its message")
	default:
		return fieldType, number, from, from + int(size)
	}
	return ' ', 0, 0, 0
}

// walk checks the fields of a message, and returns where the last of each stands, of those with small numbers.
func (p *parser) walk(message byte, i, end int) (found [9]span) {
	var inner [9]span
	for i < end && p.err == nil {
		fieldType, number, from, to := p.field(message, i, end)
		if 'A' <= fieldType && fieldType <= 'Z' {
			inner = p.walk(fieldType, from, to)
		}
		i = to
		if number < len(found) {
			found[number] = span{uint32(from), uint32(to)}
		}
		switch name, value := inner[1], inner[2]; {
		case p.err != nil:
		case fieldType == 's' && !utf8.Valid(p.buf[from:to]):
			p.fail(from, "invalid UTF-8")
		case fieldType == 'L' && name.from == name.to && message == 'M':
			p.fail(from, "expected a label name")
		case fieldType == 'L' && message == 'M':
			p.quotes = p.quotes || !isBareLabel(p.buf[name.from:name.to])
			p.addLabel(int(name.from), int(name.to), int(value.from), int(value.to)+1) // as if there was a quote
		case fieldType == 'H':
			p.checkNative(from, to, inner)
		case fieldType == 'Q', fieldType == 'B' && !p.isInfinite:
			p.samples++
			p.isInfinite = math.IsInf(p.float(value), 1)
		}
	}
	return found
}

// checkNative checks a histogram if it is native: Prometheus would refuse the page if something is wrong with one.
func (p *parser) checkNative(i, end int, found [9]span) {
	var spans, lengths, ints, floats [2]int // by side of zero: spans, their lengths in all, and buckets
	var last, ends [2]int64                 // bucket that deltas make, and index after the last span
	total, isBroken, start := p.integer(found[7]), false, i
	p.isNative = total > 0 || p.float(found[6]) > 0
	for i < end {
		_, number, from, to := p.field(0, i, end)
		side := number / 12 & 1
		switch i = to; number {
		case 9, 12:
			span := p.walk('P', from, to)
			offset, length := uint32(p.integer(span[1])), uint32(p.integer(span[2]))
			isBroken = isBroken || spans[side] > 0 && offset&1 > 0 // only the first offset may be below zero
			spans[side]++
			ends[side] += int64(int32(offset>>1)^-int32(offset&1)) + int64(length)
			isBroken = isBroken || ends[side]-int64(length) < math.MinInt32 || ends[side] > math.MaxInt32
			lengths[side] += int(length)
			p.isNative = true
		case 10, 13:
			for delta := uint64(0); from < to && p.err == nil; ints[side]++ {
				delta, from = p.varint(from, to)
				last[side] += int64(delta>>1) ^ -int64(delta&1)
				total += uint64(last[side])
				isBroken = isBroken || last[side] < 0
			}
		case 11, 14:
			for ; from < to; from += 8 {
				isBroken = isBroken || p.float(span{uint32(from), uint32(to)}) < 0
				floats[side]++
			}
		}
	}
	isFloat := p.float(found[4]) > 0 || p.float(found[8]) > 0 || floats != [2]int{}
	isBroken = isBroken || isFloat && (p.float(found[4]) < 0 || p.float(found[8]) < 0)
	count, schema, sum := p.integer(found[1]), p.integer(found[5]), p.float(found[2])
	switch {
	case !p.isNative || p.err != nil:
	case isFloat && lengths != floats || !isFloat && lengths != ints:
		p.fail(start, "expected as many buckets of a native histogram as there are in its spans")
	case isBroken || schema&1 == 0 && schema > 2*8 || schema&1 > 0 && schema > 2*4-1: // the last bit is the sign
		p.fail(start, "expected a native histogram with a known schema, spans in order, and no bucket below zero")
	case !isFloat && (total > count || total < count && !math.IsNaN(sum)): // a NaN is in no bucket
		p.fail(start, "expected as many observations of a native histogram as there are in its buckets")
	}
}

// varint reads the integer at i, and returns where it ends.
func (p *parser) varint(i, end int) (uint64, int) {
	if i < end && p.buf[i] < 0x80 { // most are small
		return uint64(p.buf[i]), i + 1
	}
	value, n := binary.Uvarint(p.buf[i:end])
	if n <= 0 {
		p.fail(i, "expected an integer")
	}
	return value, i + n
}

// integer returns the integer in a range, 0 if that is empty.
func (p *parser) integer(s span) (value uint64) {
	value, _ = binary.Uvarint(p.buf[s.from:s.to])
	return value
}

// float returns the float in a range, 0 if that is empty.
func (p *parser) float(s span) float64 {
	var value [8]byte
	copy(value[:], p.buf[s.from:s.to])
	return math.Float64frombits(binary.LittleEndian.Uint64(value[:]))
}

// appendTag appends what a field begins with.
func appendTag(dst []byte, number, wire int) []byte {
	return binary.AppendUvarint(dst, uint64(number<<3|wire))
}

// appendBytes appends a field with a text or a message.
func appendBytes(dst []byte, number int, contents []byte) []byte {
	return append(binary.AppendUvarint(appendTag(dst, number, bytesWire), uint64(len(contents))), contents...)
}

// appendInteger appends a field with an integer.
func appendInteger(dst []byte, number int, value uint64) []byte {
	return binary.AppendUvarint(appendTag(dst, number, varintWire), value)
}

// appendFloat appends a field with a float.
func appendFloat(dst []byte, number int, value float64) []byte {
	return binary.LittleEndian.AppendUint64(appendTag(dst, number, fixed64Wire), math.Float64bits(value))
}

// appendPair appends a label of a metric.
func appendPair(dst, name, value []byte) []byte {
	size := func(n int) int { return 1 + (bits.Len(uint(n)|1)+6)/7 + n } // of a field
	dst = binary.AppendUvarint(appendTag(dst, 1, bytesWire), uint64(size(len(name))+size(len(value))))
	return appendBytes(appendBytes(dst, 1, name), 2, value)
}

// ---- Bytes and predicates

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
	for class[b[i]]&digit != 0 {
		i++
	}
	return i
}

// Classes of bytes.
const (
	digit     = 1 << iota
	labelByte // of a label name
	nameByte  // of a metric name
	valueByte // that means itself in a label value, and is ASCII
)

var class = func() (t [256]uint8) {
	for c := range t {
		switch {
		case '0' <= c && c <= '9':
			t[c] = digit | labelByte | nameByte | valueByte
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '_':
			t[c] = labelByte | nameByte | valueByte
		case c == ':':
			t[c] = nameByte | valueByte
		case ' ' <= c && c < utf8.RuneSelf && c != '"' && c != '\\':
			t[c] = valueByte
		}
	}
	return t
}()

// isEscape reports whether a backslash and c make an escape in a label value.
func isEscape(c byte) bool { return c == '\\' || c == '"' || c == 'n' }

// isBareLabel reports whether name needs no quotes as a label name.
func isBareLabel(name []byte) bool { return isBareName(name) && bytes.IndexByte(name, ':') < 0 }

// isBareName reports whether name needs no quotes as a metric name.
func isBareName(name []byte) bool {
	for _, c := range name {
		if class[c]&nameByte == 0 {
			return false
		}
	}
	return len(name) > 0 && class[name[0]]&digit == 0
}

// isNumber reports whether a word is a number, however it is written. It refuses
// hexadecimal digits and underscores, which Go allows and the format does not.
func isNumber(word []byte) bool {
	_, err := strconv.ParseFloat(string(word), 64)
	return err == nil && !bytes.ContainsAny(word, "_xX")
}

// ---- Labelling

// Failures of a body: it is too long itself, or what is made of it.
var (
	errTooLarge = errors.New("larger than --max-bytes allows")
	errTooMuch  = errors.New("with its families and labels more than four times --max-bytes in memory")
)

// addedLabels are what a source adds to each of its samples.
type addedLabels struct {
	names   []string
	text    []byte    // as it stands between the braces
	fields  []byte    // as it stands in a metric of protobuf
	seen    uint64    // see nameBit
	telling bool      // they tell its series from those of all other bodies
	drop    []string  // globs of metric families that are left out instead
	idle    *sync.Map // those of all sources that have matched nothing yet
}

// add appends a label.
func (a *addedLabels) add(name, value string) {
	if len(a.names) > 0 {
		a.text = append(a.text, ',')
	}
	a.names = append(a.names, name)
	a.text = fmt.Appendf(a.text, `%s="%s"`, name, escape.Replace(value))
	a.fields = appendPair(a.fields, []byte(name), []byte(value))
	a.seen |= nameBit([]byte(name))
}

// drops reports whether the source leaves out a metric family.
func (a *addedLabels) drops(name []byte) bool {
	return slices.ContainsFunc(a.drop, func(pattern string) bool {
		matches, _ := path.Match(pattern, string(name))
		if matches {
			a.idle.Delete(pattern)
		}
		return matches
	})
}

// has reports whether a label of that name is added.
func (a *addedLabels) has(name []byte) bool { return slices.Contains(a.names, string(name)) }

// workspace is the memory that a body is read with, and then another one.
type workspace struct {
	window []byte // of the parser
	likely int    // size of the exposition

	families []family // see labeller
	index    map[uint64]int32
	blocks   []block

	// more returns a larger limit for an exposition that is to take so many bytes, or the
	// old one if there is no more to be had. Nil if the limit is fixed.
	more func(wanted, limit int) int
}

// labelBody reads a whole body of a format into an exposition that takes no more than limit bytes.
func labelBody(src io.Reader, f format, added *addedLabels, w *workspace, limit int) (*exposition, error) {
	e := &exposition{format: f, cameAsText: !f.openMetrics, telling: added.telling}
	e.buf = make([]byte, 0, w.likely)
	l := newLabeller(e, added)
	l.p = parser{window: window{src: src, buf: w.window[:0], format: f}, added: len(added.names)}
	if w.index != nil {
		e.families, l.index, l.blocks = w.families[:0], w.index, w.blocks[:0]
	}
	err := l.readLines(w.more, limit)
	w.window, w.index = nil, nil
	if cap(l.p.buf) <= 2*windowSize && len(l.index) < 1<<12 { // large ones are not kept for small bodies
		clear(l.index)
		w.window, w.families, w.index, w.blocks = l.p.buf, e.families, l.index, l.blocks
		e.families = slices.Clone(e.families)
	}
	if err != nil {
		return nil, err
	}
	if len(e.buf) < cap(e.buf)/4 { // as it is, a thousand small files would hold a thousand large buffers
		e.buf = slices.Clone(e.buf)
	}
	return e, nil
}

// labeller makes the exposition of one body.
type labeller struct {
	p         parser
	e         *exposition
	added     *addedLabels
	index     map[uint64]int32  // numbers of the families, see find
	blocks    []block           // all lines, as they came
	scattered bool              // lines of a family stand in several blocks
	at        int               // number of the family of the last line, -1 before the first
	told      int               // likewise of the last that metadata told of
	described description       // what metadata says of the lines that follow; without a name if there is none
	before    span              // where name and labels of the last sample stood
	series    []byte            // room to write a metric of protobuf in
	prefix    []byte            // what samples of this name begin with: name, brace and added labels
	exported  [][]byte          // new names of the sample's labels that give way to added ones
	bare      map[string]string // the sample's label names that need quotes, without; nil to keep quotes
	anew      bool              // each sample is written anew, though it may be plain
	stored    metricType        // histogram or summary if bounds are written as Prometheus 3 stores them for it
}

// block is where lines of one family stand together.
type block struct {
	family int32
	span
}

// description is what metadata says of a metric family.
type description struct {
	name, help []byte
	suffix     string // what the name has after that in text
	metricType metricType
	unit       int  // length of the unit, with which the name ends
	typed      bool // there was a TYPE line, though perhaps of untyped
}

// newLabeller returns a labeller that adds to an exposition.
func newLabeller(e *exposition, added *addedLabels) *labeller {
	return &labeller{e: e, added: added, index: map[uint64]int32{}, at: -1, told: -1}
}

// readLines reads the body to its end and sorts its families. It fails if they take more than limit bytes.
func (l *labeller) readLines(more func(wanted, limit int) int, limit int) error {
	fits := func(extra int) bool {
		held := l.e.held() + len(l.blocks)*2*12 + extra // blocks may have grown to double
		if held > limit && more != nil {
			limit = more(held, limit)
		}
		return held <= limit
	}
	for l.p.next() {
		switch {
		case l.p.kind == headLine:
			l.beginMessage(l.p.name, l.p.text, l.p.unit, l.p.metricType)
		case l.p.kind != sampleLine:
			l.describe()
		case l.p.protobuf:
			l.metric()
		default:
			l.sample()
		}
		if !fits(0) {
			return errTooMuch
		}
		if size := len(l.e.buf); cap(l.e.buf)-size < 1<<10 { // append would leave four times as much garbage
			l.e.buf = slices.Grow(l.e.buf, max(min(size, limit-size), 0)+2<<10)
		}
	}
	if l.p.err != nil {
		return l.p.err
	}
	if l.scattered && !fits(len(l.e.buf)) {
		return errTooMuch
	}
	l.finish()
	return nil
}

// describe keeps what a line of metadata says until the samples come, for in OpenMetrics the name that a family has
// in text depends on its type. Of HELP texts the first is kept; two types make two families.
func (l *labeller) describe() {
	d := &l.described
	same := bytes.Equal(d.name, l.p.name)
	if !same || l.p.kind == typeLine && d.metricType != untyped && l.p.metricType != d.metricType {
		help := d.help // which begin forgets, but two families of one name both have
		if !same {
			help = help[:0]
		}
		l.begin()
		*d = description{name: append(d.name[:0], l.p.name...), help: help}
	}
	switch l.p.kind {
	case helpLine:
		text := bytes.TrimRight(l.p.text, "\r") // or it would be taken for a part of the line's end
		if l.p.openMetrics {
			text = []byte(unquoteHelp.Replace(string(text)))
		}
		if len(d.help) == 0 {
			d.help = appendRespelled(d.help, text, `\n`)
		}
	case typeLine:
		d.metricType, d.typed = l.p.metricType, true
		if l.p.openMetrics {
			d.suffix = suffixes[d.metricType]
		}
	case unitLine:
		d.unit = len(l.p.text)
	}
}

// begin makes the described family the one that lines belong to: a known one, or a new one if the type differs.
func (l *labeller) begin() {
	d := &l.described
	if len(d.name) == 0 {
		return
	}
	name := l.e.append(d.name)
	name.to = l.e.append([]byte(d.suffix)).to
	i, slot := l.find(l.e.text(name))
	if l.at >= 0 && !d.typed && bytes.Equal(d.name, l.e.text(l.e.families[l.at].base())) {
		i = l.at // HELP of a counter behind its samples
	}
	if i >= 0 && l.e.families[i].accepts(d) {
		l.e.buf = l.e.buf[:name.from]
	} else {
		i = l.add(name, slot)
	}
	f := &l.e.families[i]
	if d.metricType != untyped {
		f.metricType = d.metricType
		if int(f.suffix) != len(d.suffix) {
			f.suffix, f.unit = uint8(len(d.suffix)), 0
		}
	}
	if int(f.suffix) == len(d.suffix) {
		f.unit = cmp.Or(f.unit, uint32(d.unit))
	}
	if f.help.from == f.help.to {
		f.help = l.e.append(d.help)
	}
	l.at, l.told = i, i
	d.name, d.help = d.name[:0], d.help[:0]
}

// accepts reports whether metadata of the family's name is about this one.
func (f *family) accepts(d *description) bool {
	return f.metricType == untyped || d.metricType == untyped ||
		f.metricType == d.metricType && int(f.suffix) == len(d.suffix)
}

// suffixes are what the names of families lack in the metadata of OpenMetrics: in text they are those of samples.
var suffixes = [conflicting]string{counter: "_total", info: "_info"}

// add adds a family whose name stands in the exposition, and returns its number. If two
// families share a name, later lines belong to the last.
func (l *labeller) add(name span, slot uint64) int {
	i := len(l.e.families)
	text := l.e.text(name)
	l.e.families = append(l.e.families, family{name: name, order: uint32(i),
		quoted: !isBareName(text), dropped: l.added.drops(text)})
	l.index[slot] = int32(i)
	return i
}

// find returns the number of the family of a name, -1 if there is none, and where the index has it: at its hash, or
// after it if another name has the same. No body can be made of names that do, for the hash is keyed.
func (l *labeller) find(name []byte) (number int, slot uint64) {
	for h := maphash.Bytes(hashSeed, name); ; h++ {
		i, taken := l.index[h]
		switch {
		case !taken:
			return -1, h
		case bytes.Equal(l.e.text(l.e.families[i].name), name):
			return int(i), h
		}
	}
}

// hashSeed keys the hashes of names.
var hashSeed = maphash.MakeSeed()

// sample appends a sample with its added labels to its family.
func (l *labeller) sample() {
	if !l.p.repeated {
		l.enter()
	}
	f := &l.e.families[l.at]
	if f.dropped {
		return
	}
	if l.p.plain && !l.anew && l.p.seen&l.added.seen == 0 {
		l.relay()
	} else {
		l.relabel()
	}
	l.blocks[len(l.blocks)-1].to = uint32(len(l.e.buf))
	if len(l.p.stamp)+len(l.p.exemplar) > 0 {
		f.moments, f.quoted = true, f.quoted || l.p.quotes
	}
	l.e.samples++
	series := l.p.buf[l.p.start:l.p.value]
	if l.p.repeated && len(l.p.stamp) == 0 && l.e.twice == "" && // and so the line before is still in the window
		bytes.Equal(series, l.p.buf[l.before.from:l.before.to]) {
		l.e.twice = string(l.p.name)
	}
	l.before = span{uint32(l.p.start), uint32(l.p.value)}
	if l.p.seen&boundNames != 0 || l.p.buf[l.p.value] == '-' {
		f.contradict(&l.p)
	}
}

// enter makes the family of the sample's name the one that lines belong to.
func (l *labeller) enter() {
	name := l.p.name
	switch suffix, ok := bytes.CutPrefix(name, l.described.name); {
	case !ok:
	case len(suffix) == 0: // some counters of OpenMetrics have no suffix,
		l.described.suffix = ""
	case string(suffix) == "_total" && l.described.metricType == counter: // and some of text have one
		l.described.suffix = "_total"
	}
	l.begin()
	if l.at < 0 || !l.e.covers(&l.e.families[l.at], name) {
		if l.at = l.told; l.at < 0 || !l.e.covers(&l.e.families[l.at], name) {
			l.at = l.familyOf(name)
		}
	}
	f := &l.e.families[l.at]
	isKnown := f.sameName || f.otherName // it has samples already
	if bytes.Equal(name, l.e.text(f.name)) {
		f.sameName = true
	} else {
		f.otherName = true
		f.created = f.created || bytes.HasSuffix(name, []byte("_created"))
	}
	l.prefix = append(append(l.prefix[:0], name...), '{')
	if len(l.added.text) > 0 {
		l.prefix = append(append(l.prefix, l.added.text...), ',')
	}
	last, here := len(l.blocks)-1, uint32(len(l.e.buf))
	if last < 0 || l.blocks[last].family != int32(l.at) || l.blocks[last].to != here {
		l.blocks = append(l.blocks, block{int32(l.at), span{here, here}})
		l.scattered = l.scattered || isKnown
	}
}

// familyOf returns the number of the family that a sample belongs to, a new one if there is none:
// one of its name that has a type goes before one that claims it, and that before one without.
func (l *labeller) familyOf(sample []byte) int {
	own, slot := l.find(sample)
	if own >= 0 && l.e.families[own].metricType != untyped {
		return own
	}
	if end := bytes.LastIndexByte(sample, '_'); end > 0 && claimers(string(sample[end:]), l.e.openMetrics) != 0 {
		for _, suffix := range []string{"", suffixes[counter]} {
			i, _ := l.find(append(sample[:end:end], suffix...))
			if i >= 0 && l.e.covers(&l.e.families[i], sample) {
				return i
			}
		}
	}
	if own < 0 {
		own = l.add(l.e.append(sample), slot)
	}
	return own
}

// boundNames are the bits of the labels that bound a bucket or a quantile.
var boundNames = nameBit([]byte("le")) | nameBit([]byte("quantile"))

// contradict notes which types the sample speaks against: the strictest parsers refuse
// a bound that is not a number, and a bucket or count below zero.
func (f *family) contradict(p *parser) {
	bucket := false
	for _, l := range p.labels {
		switch string(p.labelName(l)) {
		case "le":
			bucket = true
			f.noHistogram = f.noHistogram || !isNumber(p.labelText(l))
		case "quantile":
			f.noSummary = f.noSummary || !isNumber(p.labelText(l))
		}
	}
	if p.buf[p.value] == '-' && (bucket || bytes.HasSuffix(p.name, []byte("_count"))) {
		f.noHistogram = f.noHistogram || floatOf(p.valueText()) < 0
	}
}

// relay appends a plain sample as it came, after its name and the added labels.
func (l *labeller) relay() {
	out, rest := append(l.e.buf, l.prefix...), l.p.start+len(l.p.name)
	switch {
	case len(l.p.labels) > 0:
		rest += len("{")
	case len(l.added.text) > 0: // instead of the comma before labels of its own
		out[len(out)-1] = '}'
	default: // without a brace
		out = out[:len(out)-1]
	}
	l.e.buf = append(out, l.p.buf[rest:l.p.pos]...)
}

// relabel appends a sample that is not plain, or whose labels get other names.
func (l *labeller) relabel() {
	out, open := l.e.buf, byte('{')
	if isBareName(l.p.name) {
		out = append(out, l.p.name...)
	} else {
		out = append(append(append(out, `{"`...), l.p.name...), '"')
		open = ','
	}
	if len(l.added.text) > 0 {
		out = append(append(out, open), l.added.text...)
		open = ','
	}
	l.renameLabels()
	for _, lb := range l.p.labels {
		if name := l.newName(lb); len(name) > 0 {
			out = l.appendLabel(append(out, open), name, lb)
			open = ','
		}
	}
	if open == ',' {
		out = append(out, '}')
	}
	out = append(append(out, ' '), l.p.valueText()...)
	l.e.buf = append(l.appendMoment(out), '\n')
}

// newName returns the name of a label of the sample, which is another if its own is an added label's, or
// needs quotes that this exposition does without. It is empty if the label is, and another one gets its name.
func (l *labeller) newName(lb label) []byte {
	name := l.p.labelName(lb)
	mayClash := l.p.seen&l.added.seen != 0 && (l.added.has(name) || bytes.HasPrefix(name, []byte("exported_")))
	if mayClash && len(l.p.labelText(lb)) == 0 {
		return nil
	}
	if l.added.has(name) {
		name = l.exportedName(name)
	}
	if bare, ok := l.bare[string(name)]; ok {
		name = []byte(bare)
	}
	return name
}

// appendMoment appends the sample's timestamp and exemplar as its exposition's format has them.
func (l *labeller) appendMoment(dst []byte) []byte {
	switch {
	case len(l.p.stamp) == 0:
	case l.p.openMetrics == l.e.openMetrics:
		dst = append(append(dst, ' '), l.p.stamp...)
	case l.p.openMetrics:
		dst = strconv.AppendInt(append(dst, ' '), max(0, millisOf(l.p.stamp)), 10) // text has none before 1970
	default:
		dst = appendSeconds(append(dst, ' '), l.p.stamp)
	}
	if len(l.p.exemplar) > 0 && l.e.openMetrics && !(l.p.quotes && l.bare != nil) {
		dst = append(append(dst, ' '), l.p.exemplar...)
	}
	return dst
}

// millisOf returns the milliseconds that Prometheus makes of seconds, or the nearest that there are.
func millisOf(seconds []byte) int64 { return int64(max(-1<<62, min(floatOf(seconds)*1000, 1<<62))) }

// appendSeconds appends milliseconds as seconds. Prometheus, which multiplies floats, would
// make a millisecond less of some; there one more digit keeps it from that.
func appendSeconds(dst, millis []byte) []byte {
	ms, _ := strconv.ParseInt(string(millis), 10, 64)
	from := len(dst)
	dst = strconv.AppendInt(dst, ms/1000, 10)
	point := len(dst)
	dst = strconv.AppendInt(dst, 1000+ms%1000, 10)
	dst[point] = '.' // instead of the 1, which kept the zeros before the digits
	if int64(floatOf(dst[from:])*1000) < ms && ms < 1e15 {
		dst = append(dst, '1')
	}
	return dst
}

// appendLabel appends a label of the sample under a name.
func (l *labeller) appendLabel(dst, name []byte, lb label) []byte {
	if isBareLabel(name) {
		dst = append(dst, name...)
	} else {
		dst = append(append(append(dst, '"'), name...), '"')
		l.e.families[l.at].quoted = true
	}
	dst = append(dst, `="`...)
	value := l.p.labelText(lb)
	if l.stored == histogram && string(name) == "le" || l.stored == summary && string(name) == "quantile" {
		return append(appendBound(dst, value), '"')
	}
	return append(appendRespelled(dst, value, `\"n`), '"')
}

// appendBound appends a bound of a bucket or a quantile as Prometheus stores it for a histogram or a summary.
func appendBound(dst, bound []byte) []byte {
	value, err := strconv.ParseFloat(string(bound), 64)
	if err != nil {
		return appendRespelled(dst, bound, `\"n`)
	}
	if value == 0 {
		value = math.Abs(value) // -0 is stored as 0
	}
	from := len(dst)
	dst = strconv.AppendFloat(dst, value, 'g', -1, 64)
	if !bytes.ContainsAny(dst[from:], ".eIN") {
		dst = append(dst, ".0"...)
	}
	return dst
}

// exportedName returns the name under which a label of the sample gives way to an added
// one: as in Prometheus, with exported_ before it until no other label has it.
func (l *labeller) exportedName(name []byte) []byte {
	n := len(l.exported)
	l.exported = slices.Grow(l.exported, 1)[:n+1]
	free := append(l.exported[n][:0], name...)
	same := func(name []byte) bool { return bytes.Equal(name, free) }
	for l.added.has(free) || slices.ContainsFunc(l.exported[:n], same) || len(l.p.labelNamed(free)) > 0 {
		free = slices.Insert(free, 0, []byte("exported_")...)
	}
	l.exported[n] = free
	return free
}

// renameLabels finds a name without quotes for each label of the sample that needs some.
// Labels that would get the same name are numbered in the order of the names they have:
// a series stays the same series when an exporter writes its labels in another order.
func (l *labeller) renameLabels() {
	l.exported = l.exported[:0]
	if l.bare == nil {
		return
	}
	l.bare = map[string]string{}          // clearing one that was large takes long
	used := map[string]int{"__name__": 1} // by name, the last number tried
	for _, lb := range l.p.labels {
		if name := l.p.labelName(lb); isBareLabel(name) {
			used[string(name)] = 1
		}
	}
	if len(used) > len(l.p.labels) { // none needs quotes
		return
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

// underscores returns a name with an underscore for each character that needs quotes, like escaping=underscores.
func underscores(name []byte) []byte {
	if isBareName(name) {
		return name
	}
	out := make([]byte, 0, len(name))
	for i, c := range unescape.Replace(string(name)) {
		if c >= utf8.RuneSelf || class[c]&nameByte == 0 || i == 0 && class[c]&digit != 0 {
			c = '_'
		}
		out = append(out, byte(c))
	}
	return out
}

// escape turns a text into what stands for it in a label value.
var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// unescape turns a label value or a quoted name into what it stands for.
var unescape = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\n`, "\n")

// unquoteHelp removes the escape of quotes in a HELP text, which only OpenMetrics has.
var unquoteHelp = strings.NewReplacer(`\\`, `\\`, `\"`, `"`)

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

// beginMessage adds the family that the metrics of a message belong to.
func (l *labeller) beginMessage(name, help, unit []byte, t metricType) {
	_, slot := l.find(name)
	l.at = l.add(l.e.append(name), slot)
	f := &l.e.families[l.at]
	f.metricType, f.help, f.unit = t, l.e.append(help), uint32(len(unit))
	here := l.e.append(unit).to
	l.blocks = append(l.blocks, block{int32(l.at), span{here, here}})
}

// metric appends a metric as it came.
func (l *labeller) metric() {
	f := &l.e.families[l.at]
	if f.dropped {
		return
	}
	metric := l.p.buf[l.p.value:l.p.pos]
	if l.bare != nil || l.p.seen&l.added.seen != 0 {
		metric = l.relabelled()
	}
	l.addMetric(metric)
	l.e.samples += l.p.samples
	f.quoted = f.quoted || l.p.quotes
	f.moments = f.moments || l.p.isNative
}

// addMetric appends a metric with the added labels behind it: they may stand anywhere in its message.
func (l *labeller) addMetric(metric []byte) {
	out := appendTag(l.e.buf, 4, bytesWire)
	out = binary.AppendUvarint(out, uint64(len(metric)+len(l.added.fields)))
	l.e.buf = append(append(out, metric...), l.added.fields...)
	l.blocks[len(l.blocks)-1].to = uint32(len(l.e.buf))
}

// relabelled returns the metric with other names for labels that need them.
func (l *labeller) relabelled() []byte {
	out := l.series[:0]
	l.renameLabels()
	for _, lb := range l.p.labels {
		if name := l.newName(lb); len(name) > 0 {
			out = appendPair(out, name, l.p.labelText(lb))
		}
	}
	for i := l.p.value; i < l.p.pos; {
		_, number, _, to := l.p.field(0, i, l.p.pos)
		if number != 1 {
			out = append(out, l.p.buf[i:to]...)
		}
		i = to
	}
	l.series = out
	return out
}

// floatOf returns the number that a word stands for.
func floatOf(word []byte) float64 {
	value, _ := strconv.ParseFloat(string(word), 64)
	return value
}

// finish brings the families into the order of their names.
func (l *labeller) finish() {
	l.begin()
	if l.scattered {
		l.gather()
	} else {
		for _, b := range l.blocks {
			l.e.families[b.family].lines = b.span
		}
	}
	all := len(l.e.families)
	l.e.families = slices.DeleteFunc(l.e.families, func(f family) bool { return f.dropped })
	l.e.dropped = all - len(l.e.families)
	l.e.quoted = slices.ContainsFunc(l.e.families, func(f family) bool { return f.quoted })
	slices.SortStableFunc(l.e.families, func(a, b family) int {
		return bytes.Compare(l.e.text(a.name), l.e.text(b.name))
	})
}

// gather writes the buffer anew, with the lines of each family together.
func (l *labeller) gather() {
	old := l.e.buf
	for _, b := range l.blocks {
		l.e.families[b.family].lines.to += b.to - b.from
	}
	l.e.buf = make([]byte, 0, len(old))
	for i := range l.e.families {
		f := &l.e.families[i]
		size := int(f.lines.to)
		f.name, f.help = l.e.append(old[f.name.from:f.name.to]), l.e.append(old[f.help.from:f.help.to])
		f.lines = span{f.help.to, f.help.to}
		l.e.buf = l.e.buf[:len(l.e.buf)+size]
	}
	for _, b := range l.blocks {
		f := &l.e.families[b.family]
		f.lines.to += uint32(copy(l.e.buf[f.lines.to:], old[b.from:b.to]))
	}
}

// ---- One exposition

// exposition is one body with its labels added and its families in the order of their
// names. It never changes, so that scrapes can share it.
type exposition struct {
	buf      []byte // names, HELP texts and lines of the families
	families []family
	samples  int
	dropped  int    // families that were left out
	twice    string // name of a metric that has one series twice, one after the other

	format
	cameAsText bool // its body was not OpenMetrics
	telling    bool // its labels tell its series from those of all other bodies
	quoted     bool // a name in it needs quotes
}

// format is what a body or a page is written in: the text format, unless it is one of these.
type format struct{ openMetrics, protobuf bool }

// text returns a range of the exposition.
func (e *exposition) text(s span) []byte { return e.buf[s.from:s.to] }

// append appends text to the buffer.
func (e *exposition) append(text []byte) span {
	from := uint32(len(e.buf))
	e.buf = append(e.buf, text...)
	return span{from, uint32(len(e.buf))}
}

// held is the memory that the exposition and a page made of it take, in bytes.
func (e *exposition) held() int { return len(e.buf) + len(e.families)*familySize }

// familySize is the memory that a family takes, in bytes: 44 here, as much again while
// their slice grows, 24 while it is looked up, and 72 while it is merged.
const familySize = 184

// span is a range of an exposition's buf.
type span struct{ from, to uint32 }

// family is what one body has of one metric family.
type family struct {
	name, help span // escaped as in the format; the name is the one that the family has in text
	lines      span
	unit       uint32 // length of the unit, 0 if there is none; in protobuf it stands after the HELP text
	order      uint32 // among the families of the body as they came
	suffix     uint8  // length of what the name has after the one in metadata as it came: _total, _info or nothing
	metricType metricType
	quoted     bool // the family's name or one in its lines needs quotes
	sameName   bool // a sample has the family's name
	otherName  bool // a sample has another name
	created    bool // and ends in _created
	moments    bool // a sample has a timestamp or an exemplar; in protobuf, is a native histogram
	dropped    bool // it is left out

	noHistogram, noSummary bool // a sample contradicts that type, see contradict
}

// base returns where the name stands that the family has in metadata as it came.
func (f *family) base() span { return span{f.name.from, f.name.to - uint32(f.suffix)} }

// unitText returns the unit, with which that name ends if it is text.
func (e *exposition) unitText(f *family) []byte {
	base := f.base()
	if e.protobuf {
		return e.text(span{f.help.to, f.help.to + f.unit})
	}
	return e.text(span{base.to - f.unit, base.to})
}

// covers reports whether samples of a name belong to a family.
func (e *exposition) covers(f *family, sample []byte) bool {
	if bytes.Equal(sample, e.text(f.name)) {
		return true
	}
	suffix, ok := bytes.CutPrefix(sample, e.text(f.base()))
	return ok && (len(suffix) == 0 && e.openMetrics || claimers(string(suffix), e.openMetrics).has(f.metricType))
}

// typeSet has a bit for each type that was given to one family.
type typeSet uint16

// has reports whether the type is in the set.
func (ts typeSet) has(t metricType) bool { return ts&(1<<t) != 0 }

// agreed returns the one type in the set beside untyped, which is no opinion.
func (ts typeSet) agreed() metricType {
	ts &^= 1 << untyped
	if ts.has(gauge) { // in text an info is one, and in OpenMetrics it has another name
		ts &^= 1 << info
	}
	switch bits.OnesCount16(uint16(ts)) {
	case 0:
		return untyped
	case 1:
		return metricType(bits.TrailingZeros16(uint16(ts)))
	}
	return conflicting
}

// claimers returns the types whose families have samples with that suffix to their name.
func claimers(suffix string, openMetrics bool) typeSet {
	switch {
	case suffix == "_bucket":
		return 1<<histogram | 1<<gaugeHistogram
	case suffix == "_count", suffix == "_sum":
		return 1<<histogram | 1<<summary
	case suffix == "_gcount", suffix == "_gsum":
		return 1 << gaugeHistogram
	case openMetrics && suffix == "_created":
		return 1<<counter | 1<<histogram | 1<<summary
	case openMetrics && suffix == "_total":
		return 1 << counter
	case openMetrics && suffix == "_info":
		return 1 << info
	}
	return 0
}

// form is how a page is written.
type form struct {
	format
	strict bool // the strictest parsers take it, and no label value is changed; see addMessages
	quoted bool // names that need quotes have them, not underscores
}

// spelled returns the exposition for pages of a form: the families that read alike there, and those whose samples
// are written anew. It does not make protobuf of text, see as.
func (e *exposition) spelled(f form) []*exposition {
	if e.format == f.format && (f.quoted || !e.quoted) {
		return []*exposition{e}
	}
	alike := &exposition{buf: e.buf, format: e.format, cameAsText: e.cameAsText, telling: e.telling}
	anew := &exposition{format: f.format, cameAsText: e.cameAsText, telling: e.telling}
	l := newLabeller(anew, &addedLabels{})
	if e.quoted && !f.quoted {
		l.bare = map[string]string{}
	}
	for _, own := range e.families {
		switch {
		case f.openMetrics && !e.openMetrics && own.sameName && isStartTime(own.metricType, e.text(own.name)):
			known := len(l.e.families)
			l.rewrite(e, &own, true, true)
			for i := known; i < len(l.e.families); i++ {
				l.e.families[i].metricType = unknown
			}
		case own.quoted && !f.quoted, e.openMetrics != f.openMetrics && e.differs(&own):
			l.rewrite(e, &own, false, false)
		default:
			if e.openMetrics && !f.openMetrics {
				own.metricType, own.suffix, own.unit = own.metricType.inText(), 0, 0
			}
			alike.families = append(alike.families, own)
		}
	}
	l.finish()
	return []*exposition{alike, l.e}
}

// differs reports whether the other format has the samples of a family in another way, or in families of their own.
func (e *exposition) differs(f *family) bool {
	return f.moments || e.openMetrics && (f.created || f.otherName && suffixes[f.metricType] != "")
}

// isStartTime reports whether samples of that name and type are start times to Prometheus in OpenMetrics.
func isStartTime(t metricType, name []byte) bool {
	return claimers("_created", true).has(t) && bytes.HasSuffix(name, []byte("_created"))
}

// inText returns the type that the text format has instead.
func (t metricType) inText() metricType {
	if t == info || t == stateset {
		return gauge
	}
	return t
}

// rewrite adds the samples of a family of another exposition to those that they belong to here,
// or, to split it, to an untyped one for each sample name. exact says that bounds are then written
// as Prometheus 3 stores them for the type that is lost.
func (l *labeller) rewrite(from *exposition, f *family, split, exact bool) {
	l.anew, l.stored = true, untyped
	if exact {
		l.stored = f.metricType
	}
	respell := func(name []byte) []byte {
		if l.bare != nil {
			return underscores(name)
		}
		return name
	}
	known, base, help := len(l.e.families), respell(from.text(f.base())), from.text(f.help)
	suffix := from.text(span{f.base().to, f.name.to})
	whole := slices.Concat(base, suffix)
	toText := from.openMetrics && !l.e.openMetrics
	switch unit := respell(from.unitText(f)); {
	case l.e.protobuf:
		l.beginMessage(base, help, from.unitText(f), f.metricType)
	case split:
	case toText:
		l.described = description{name: whole, help: help, metricType: f.metricType.inText(), typed: true}
	default:
		l.described = description{base, help, string(suffix), f.metricType, len(unit), true}
	}
	l.begin()
	l.p = parserOf(from.text(f.lines), from.format)
	var before, name []byte // of the last sample, as it was and as it is written here
	for l.p.next() {
		if l.p.protobuf {
			l.metric()
			continue
		}
		if l.p.repeated = bytes.Equal(l.p.name, before); !l.p.repeated {
			before, name = l.p.name, respell(l.p.name)
			isWhole := bytes.Equal(name, whole)
			isCreated := f.created && bytes.HasSuffix(name, []byte("_created"))
			if split || toText && !isWhole && (isCreated || suffixes[f.metricType] != "") {
				l.described = description{name: name, typed: true}
				if isWhole || bytes.Equal(name, base) {
					l.described.help = help
				}
				if !split && !isCreated { // a counter without _total
					l.described.metricType = f.metricType.inText()
				}
			}
		}
		l.p.name = name
		l.sample()
	}
	for i := known; i < len(l.e.families); i++ {
		l.e.families[i].order = f.order
	}
}
