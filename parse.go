// This file turns one body of the Prometheus text format, or of OpenMetrics,
// into its lines.
//
// A parser pulls lines out of a reader: next finds the next sample, HELP or
// TYPE line and leaves its parts in the parser's fields, as subslices of a
// window over the body. Nothing is allocated per line, and but for OpenMetrics'
// timestamps nothing is copied.
// Below next and what fills its window stands follow, the short way that most samples
// take, then the states in the order of the grammar, then the predicates. Each state takes the index at which
// it begins in the window and returns the index behind what it took, or -1 after a
// failure.
//
// Two things make it fast: a sample is compared with a model, an earlier sample of
// its name whose labels begin alike, and only the label values in which the two
// differ are scanned (the lines of a family mostly have the same labels); and it
// compares and scans eight bytes at a time.
//
// The text format is read as forgivingly as Prometheus does or more so, where the
// meaning is clear; OpenMetrics as strictly as Prometheus does: one blank where
// blanks belong, no comments, no empty lines.

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"unicode/utf8"
)

const (
	windowSize = 64 << 10 // bytes that a parser reads at once
	maxLabels  = 1 << 16  // labels that one sample may have
	fewLabels  = 32       // labels that are compared one by one; above, sorting is faster
)

// lineKind tells which fields and methods of a parser are for the line that next found.
type lineKind uint8

const (
	sampleLine lineKind = iota // name, labels, valueText, stamp, repeated, plain, tail
	helpLine                   // name, text
	typeLine                   // name, metricType
	unitLine                   // checked, and never handed out
)

// metricType is the type of a metric family; the zero value is untyped.
type metricType uint8

const (
	untyped metricType = iota
	counter
	gauge
	histogram
	summary
	conflicting // two types that differ
)

var typeNames = [...]string{"untyped", "counter", "gauge", "histogram", "summary", "untyped"}

// typeOf maps the word of a TYPE line, in lower case, to what the text format
// can say of it: OpenMetrics' info and stateset are gauges there.
var typeOf = map[string]metricType{
	"counter": counter, "gauge": gauge, "histogram": histogram, "summary": summary,
	"info": gauge, "stateset": gauge,
	"": untyped, "untyped": untyped, "unknown": untyped, "gaugehistogram": untyped,
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

// label is where one label of a sample stands, in bytes from the line's begin.
type label struct {
	name, nameEnd int32
	value, end    int32  // end is behind the closing quote
	seen          uint64 // names of this label and those before it, see nameBit
}

// model is where a sample with plain labels stands, for later ones to follow.
type model struct {
	at     int // where it begins in the window
	end    int // behind its closing brace, in bytes from at; 0 if there is no sample
	labels []label
}

// parser pulls the lines out of one body. Set src, call next until it is false,
// then look at err. The slices that next leaves are good until the next call.
type parser struct {
	src         io.Reader
	openMetrics bool  // the body is OpenMetrics
	err         error // what ended the body, nil at its end

	kind       lineKind
	name       []byte // as written between its quotes, if it has any
	text       []byte // HELP text, escapes as written
	metricType metricType
	labels     []label
	stamp      []byte // timestamp in milliseconds, empty if there is none
	repeated   bool   // the sample before has this name, too, and no metadata is between; may be missed
	plain      bool   // tail is as the text format's own encoder would write it

	buf      []byte   // window over the body
	start    int      // where the line begins in buf
	pos      int      // where the next line begins
	end      int      // where the last whole line ends; buf[end-1] is a newline
	line     int      // lines begun so far
	extra    int      // newlines inside the label values of the line
	aside    bool     // the labels are an exemplar's, and go
	prefix   int      // bytes of the name and the brace that the models share, 0 if there is no model
	empty    int      // reads in a row that brought nothing
	eof      bool     // src has ended
	short    bool     // the line runs on behind end
	rest     int      // behind the name and its brace
	value    int      // where the value begins
	valueEnd int      // and ends
	loose    int      // behind the first byte of the sample that OpenMetrics would refuse, 0 without
	ended    bool     // # EOF was there
	models   [8]model // by the first byte of the labels; with but one, mixed families take 40 % more instructions
	order    []label  // scratch of byName and exemplar
	clock    []byte   // scratch of seconds
}

// parserOf returns a parser of text in memory, which ends in a newline or is empty.
func parserOf(text []byte) parser { return parser{buf: text, end: len(text), eof: true} }

// next finds the next line that says something. It is false at the end of the
// body and at the first fault.
func (p *parser) next() bool {
	for said := false; !said; {
		if p.pos == p.end && !p.fill(0) {
			p.close()
			return false
		}
		p.line++
		p.start = p.pos
		said = p.follow() || p.scan()
		if p.short { // again, with more of the line in the window
			p.pos, p.extra, p.short, said = p.start, 0, false, false
			p.line--
			if !p.fill(p.end - p.start) {
				return false
			}
			continue
		}
		p.line += p.extra
		p.extra = 0
	}
	return p.err == nil
}

// close looks for what has to be there at the end of a body.
func (p *parser) close() {
	if p.openMetrics && !p.ended && p.err == nil {
		p.start = p.pos
		p.line++
		p.fail(p.pos, "OpenMetrics ends with # EOF: the body may be cut short")
	}
}

// fill slides the unread rest of the window to its front, forgets the models, and
// reads until the window is full and more than have bytes of it are whole lines, or
// the body has ended. It reports whether any line is left.
func (p *parser) fill(have int) bool {
	p.prefix = 0 // the models slide out
	p.buf = p.buf[:copy(p.buf, p.buf[p.pos:])]
	p.end -= p.pos
	p.pos = 0
	for p.err == nil && !p.eof && (p.end <= have || len(p.buf) < cap(p.buf)) {
		p.read()
	}
	return p.err == nil && p.end > 0
}

// read reads once into the room behind the window, which it makes if there is
// none, and ends the last line of the body if that line does not end itself.
func (p *parser) read() {
	had := len(p.buf)
	if had == cap(p.buf) {
		p.buf = slices.Grow(p.buf, max(had, windowSize))
	}
	n, err := p.src.Read(p.buf[had:cap(p.buf)])
	p.buf = p.buf[:had+n]
	switch {
	case err == io.EOF:
		p.eof = true
		if len(p.buf) > p.end && p.buf[len(p.buf)-1] != '\n' {
			p.buf = append(p.buf, '\n')
		}
	case err != nil:
		p.err = err
	case n > 0:
		p.empty = 0
	default:
		if p.empty++; p.empty == 100 {
			p.err = io.ErrNoProgress
		}
	}
	if i := bytes.LastIndexByte(p.buf[had:], '\n'); i >= 0 {
		p.end = had + i + 1
	}
}

// follow scans a sample if nothing but label values and what stands behind them tells
// it from its model, which it then becomes. It reports whether that is so.
func (p *parser) follow() bool {
	rest := p.start + p.prefix
	if rest == p.start || rest >= p.end {
		return false
	}
	m := p.modelFor(rest)
	if m.end == 0 || !m.become(p.buf[p.start:p.end], p.buf[m.at:p.end]) {
		return false
	}
	m.at, p.rest, p.labels, p.repeated = p.start, rest, m.labels, true
	p.kind, p.plain = sampleLine, true
	p.ending(p.start + m.end)
	return true
}

// modelFor returns the model for samples whose labels begin at i.
func (p *parser) modelFor(i int) *model { return &p.models[int(p.buf[i])%len(p.models)] }

// become makes the model, which stands there, one of the sample that stands here,
// and reports whether it could; half done, it is no model any more.
func (m *model) become(here, there []byte) bool {
	i := common(here[:min(len(here), m.end+7)], there) // no further: lines may repeat to the body's end
	for j := i; i < m.end; {
		end, was := m.adopt(here, i)
		if end < 0 {
			return false
		}
		if end == m.end-1 { // of the last label
			return end < len(here) && here[end] == '}'
		}
		j += was - i
		n := common(here[end:min(len(here), m.end+7)], there[j:])
		i, j = end+n, j+n
	}
	return true
}

// adopt takes over the label value that differs from the model's at i. It returns
// the label's end here and before, -1 if no plain value is there.
func (m *model) adopt(here []byte, i int) (end, was int) {
	k := len(m.labels) - 1
	for k > 0 && i < int(m.labels[k].value) {
		k--
	}
	l := &m.labels[k]
	if was = int(l.end); i < int(l.value) || i >= was {
		return -1, 0
	}
	if c := here[i-1]; c == '\\' || c >= utf8.RuneSelf { // i is within an escape or a character
		i = int(l.value)
	}
	quote := plainValue(here, i)
	if quote < 0 {
		return -1, 0
	}
	if end = quote + 1; end != was {
		m.lengthen(k, int32(end-was))
	}
	return end, was
}

// lengthen makes label k longer by n bytes.
func (m *model) lengthen(k int, n int32) {
	m.end += int(n)
	m.labels[k].end += n
	for k++; k < len(m.labels); k++ {
		l := &m.labels[k]
		l.name, l.nameEnd, l.value, l.end = l.name+n, l.nameEnd+n, l.value+n, l.end+n
	}
}

// common counts the bytes that a, the shorter one, has in common with b, or up to
// seven less. Written with [n:n+8], a step is 12 instructions, with [n:] 23.
func common(a, b []byte) int {
	b = b[:len(a)]
	n := 0
	for ; n < len(a)-7; n += 8 {
		differ := binary.LittleEndian.Uint64(a[n:n+8]) ^ binary.LittleEndian.Uint64(b[n:n+8])
		if differ != 0 {
			return n + bits.TrailingZeros64(differ)/8
		}
	}
	return n
}

// scan scans one line and reports whether it says something or is at fault.
func (p *parser) scan() bool {
	i := p.blanks(p.start)
	switch c := p.buf[i]; {
	case p.ended:
		p.fail(i, "more text behind # EOF")
		return true
	case p.openMetrics && c <= ' ':
		p.fail(p.start, "OpenMetrics has no empty lines")
		return true
	case c == '#':
		return p.comment(i)
	case c == '\n' || c == '\r' && p.buf[i+1] == '\n':
		p.pos = i + bytes.IndexByte(p.buf[i:], '\n') + 1
		return false
	}
	p.sample(i)
	return true
}

// comment scans a line that begins with #, and reports whether it is metadata
// or at fault. As in Prometheus' parser, metadata has a blank behind the #.
func (p *parser) comment(i int) bool {
	end := i + bytes.IndexByte(p.buf[i:], '\n')
	p.pos = end + 1
	if n := bytes.IndexByte(p.buf[i:end], 0); n >= 0 {
		p.fail(i+n, "NUL byte")
		return true
	}
	if p.openMetrics {
		return p.directive(end)
	}
	if p.buf[end-1] == '\r' {
		end--
	}
	word := p.blanks(i + 1)
	switch {
	case word == i+1:
		return false
	case bytes.HasPrefix(p.buf[word:end], []byte("HELP")):
		p.kind = helpLine
	case bytes.HasPrefix(p.buf[word:end], []byte("TYPE")):
		p.kind = typeLine
	default:
		return false
	}
	i = p.blanks(word + len("HELP"))
	if i == word+len("HELP") || i == end {
		return false
	}
	p.metadata(i, end)
	return true
}

// directive scans a line of OpenMetrics that begins with #, and reports whether it
// is metadata to hand out or at fault.
func (p *parser) directive(end int) bool {
	switch line := p.buf[p.start:end]; {
	case string(line) == "# EOF":
		p.ended, p.prefix = true, 0
		return false
	case bytes.HasPrefix(line, []byte("# HELP ")):
		p.kind = helpLine
	case bytes.HasPrefix(line, []byte("# TYPE ")):
		p.kind = typeLine
	case bytes.HasPrefix(line, []byte("# UNIT ")):
		p.kind = unitLine
	default:
		p.fail(p.start, "OpenMetrics has no comments, only # HELP, # TYPE, # UNIT and # EOF")
		return true
	}
	p.metadata(p.start+len("# HELP "), end)
	return p.kind != unitLine || p.err != nil
}

// metadata scans the metric name at i and what a line of metadata says of it.
func (p *parser) metadata(i, end int) int {
	p.prefix = 0 // a sample behind metadata repeats nothing
	if p.buf[i] == '"' {
		name := i + 1
		if i = p.quotedName(i); i < 0 {
			return i
		}
		p.name = p.buf[name : i-1]
	} else if i = p.bareName(i); i < 0 {
		return i
	}
	rest := p.blanks(i)
	switch {
	case p.openMetrics && p.buf[i] != ' ', rest == i && i != end:
		return p.fail(i, "unexpected character in a metric name")
	case p.openMetrics && p.kind != helpLine:
		rest = i + 1
	}
	p.text = p.buf[rest:end]
	switch {
	case p.kind == helpLine && !utf8.Valid(p.text):
		return p.fail(rest, "invalid UTF-8 in a HELP text")
	case p.kind == typeLine && !p.setType():
		return p.fail(rest, "unknown metric type")
	case p.kind == unitLine && len(p.text) > 0 && !bytes.HasSuffix(p.name, append([]byte("_"), p.text...)):
		return p.fail(rest, "the unit is not the end of the metric name")
	}
	return end
}

// setType reads the word of a TYPE line, and reports whether it is known.
// OpenMetrics says unknown where the text format says untyped or nothing.
func (p *parser) setType() (known bool) {
	word := p.text
	if p.openMetrics {
		p.metricType, known = typeOf[string(word)]
		return known && len(word) > 0 && string(word) != "untyped"
	}
	word = bytes.TrimRight(word, " \t")
	if p.metricType, known = typeOf[string(word)]; !known {
		p.metricType, known = typeOf[string(bytes.ToLower(word))]
	}
	return known
}

// sample scans a sample.
func (p *parser) sample(i int) {
	p.kind, p.plain, p.loose = sampleLine, true, 0
	if i > p.start {
		p.loosen(p.start)
	}
	if i = p.series(i); i >= 0 && len(p.labels) >= fewLabels && p.repeatsLabel() {
		i = p.fail(p.rest, "a label name is there twice")
	}
	if i >= 0 {
		p.ending(i)
	}
}

// series scans the name and the labels of a sample: name, name{…}, {"name",…}.
func (p *parser) series(i int) int {
	p.repeated = p.prefix > 0 && bytes.HasPrefix(p.buf[i:p.end], p.name) && p.buf[i+len(p.name)] == '{'
	if p.repeated {
		p.rest = i + p.prefix
	} else if i = p.nameAndBrace(i); i < 0 || p.buf[i-1] != '{' {
		return i
	}
	m := p.modelFor(p.rest)
	m.end, p.labels = 0, m.labels[:0]
	if i = p.labelSet(p.rest); i >= 0 && p.name == nil {
		return p.fail(i, "no metric name before or in the braces")
	}
	m.labels = p.labels
	if n := len(p.labels); i >= 0 && p.plain && 0 < n && n < fewLabels {
		m.at, m.end, p.prefix = p.start, i-p.start, p.rest-p.start
	}
	return i
}

// nameAndBrace scans the name before the brace and the brace, what there is of
// them, and drops the models, which are of another name or have slid out.
func (p *parser) nameAndBrace(i int) int {
	p.name, p.labels, p.prefix = nil, p.labels[:0], 0
	for k := range p.models {
		p.models[k].end = 0
	}
	if p.buf[i] != '{' {
		if i = p.bareName(i); i < 0 {
			return i
		}
	}
	p.rest = i
	open := p.blanks(i)
	switch {
	case p.buf[open] != '{' && open == i:
		return p.fail(i, "unexpected character in a metric name")
	case p.buf[open] != '{':
		return i
	case open > i:
		p.loosen(i)
	}
	p.rest = open + 1
	return p.rest
}

// bareName scans a metric name of the classic character set into name.
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
		return "a byte order mark: save the text without it"
	case rest[0] == '<':
		return "expected a metric name, this looks like HTML"
	case rest[0] == 0:
		return "NUL byte"
	}
	return "expected a metric name"
}

// quotedName scans a quoted name. Only one spelling of a name is taken, so that
// names can be compared as they are written.
func (p *parser) quotedName(i int) int {
	name := i + 1
	plain, extra := p.plain, p.extra
	p.plain = true
	i = p.labelValue(name)
	switch {
	case i < 0:
		return i
	case i == name:
		return p.fail(name, "an empty name")
	case !p.plain || p.extra != extra:
		return p.fail(name, `an escape other than \\ \" \n in a name`)
	case bytes.IndexByte(p.buf[name:i], 0) >= 0:
		return p.fail(name, "NUL byte")
	}
	p.plain = plain
	return i + 1
}

// labelSet scans labels up to the closing brace, from behind the opening one or
// behind a label. One comma may follow each label; none need to.
func (p *parser) labelSet(i int) int {
	for first := i == p.rest; i >= 0; first = false {
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
			p.loosen(i)
		}
		if end := p.plainLabels(i); end > i {
			i = end
		} else {
			i = p.label(i)
		}
	}
	return i
}

// plainLabels scans labels that are written name="value", with commas between
// them and nothing else, as nearly all are. It stops behind the last such label
// and leaves all that is odd to label.
func (p *parser) plainLabels(i int) int {
	b, labels, seen := p.buf[:p.end], p.labels, p.seen()
	done := i
	for len(labels) < fewLabels {
		j := labelBytes(b, i)
		if j == i || j+2 > len(b) || b[j] != '=' || b[j+1] != '"' || b[i] <= '9' {
			break
		}
		k := plainValue(b, j+2)
		bit := nameBit(b[i:j])
		if k < 0 || seen&bit != 0 || b[i] == '_' {
			break
		}
		seen |= bit
		labels = append(labels, label{})
		l := &labels[len(labels)-1] // set in place: appending a filled one stalls, 10 % of all time
		l.name, l.nameEnd = int32(i-p.start), int32(j-p.start)
		l.value, l.end, l.seen = int32(j+2-p.start), int32(k+1-p.start), seen
		done = k + 1
		if b[done] != ',' {
			break
		}
		i = done + 1
	}
	p.labels = labels
	return done
}

// plainValue returns where the closing quote of the label value at i stands, -1
// if the value needs a closer look or the window ends within eight bytes.
func plainValue(b []byte, i int) int {
	for len(b)-i >= 8 {
		m := special(binary.LittleEndian.Uint64(b[i:]))
		if m == 0 {
			i += 8
			continue
		}
		i += bits.TrailingZeros64(m) / 8
		if b[i] == '"' {
			return i
		}
		if b[i] != '\\' || !isEscape(b[i+1]) {
			break
		}
		i += 2
	}
	return -1
}

// labelBytes returns the index behind the letters, digits and underscores at i.
func labelBytes(b []byte, i int) int {
	for len(b)-i >= 8 {
		if m := notLabel(binary.LittleEndian.Uint64(b[i:])); m != 0 {
			return i + bits.TrailingZeros64(m)/8
		}
		i += 8
	}
	for class[b[i]]&labelByte != 0 {
		i++
	}
	return i
}

// label scans one label, or the quoted metric name among the labels.
func (p *parser) label(i int) int {
	name, nameEnd, quoted := i, i, p.buf[i] == '"'
	if quoted {
		p.plain = false
		if i = p.quotedName(i); i < 0 {
			return i
		}
		name, nameEnd = name+1, i-1
	} else {
		i = labelBytes(p.buf, i)
		if nameEnd = i; i == name || class[p.buf[name]]&digit != 0 {
			return p.fail(name, "expected a label name")
		}
	}
	if i = p.gap(i); p.buf[i] != '=' {
		if p.name != nil || !quoted {
			return p.fail(i, "expected = behind a label name")
		}
		p.name = p.buf[name:nameEnd]
		return i
	}
	if i = p.gap(i + 1); p.buf[i] != '"' {
		return p.fail(i, "expected a quoted label value")
	}
	value := i + 1
	if i = p.labelValue(value); i < 0 {
		return i
	}
	return p.addLabel(name, nameEnd, value, i+1)
}

// addLabel keeps a label, unless its name is reserved or there already. As in
// Prometheus, an exemplar, which goes, may have any.
func (p *parser) addLabel(name, nameEnd, value, end int) int {
	if p.aside {
		return end
	}
	here := p.buf[name:nameEnd]
	bit := nameBit(here)
	n := len(p.labels)
	seen := p.seen()
	if seen&bit != 0 && n < fewLabels && p.hasLabel(here) {
		return p.fail(name, "a label name is there twice")
	}
	if string(here) == "__name__" {
		return p.fail(name, "the label name __name__ is reserved")
	}
	if n == maxLabels {
		return p.fail(name, fmt.Sprintf("more than %d labels", maxLabels))
	}
	p.labels = append(p.labels, label{})
	l := &p.labels[n] // set in place: appending a filled one stalls, 10 % of all time
	l.name, l.nameEnd = int32(name-p.start), int32(nameEnd-p.start)
	l.value, l.end, l.seen = int32(value-p.start), int32(end-p.start), seen|bit
	return end
}

// labelValue scans a label value and returns where its closing quote stands. It
// looks at eight bytes at a time for one that needs a closer look.
func (p *parser) labelValue(i int) int {
	b := p.buf[:p.end]
	value, ascii := i, true
	for {
		for len(b)-i >= 8 {
			if m := special(binary.LittleEndian.Uint64(b[i:])); m != 0 {
				i += bits.TrailingZeros64(m) / 8
				break
			}
			i += 8
		}
		if i >= len(b) {
			p.short = !p.eof
			return p.fail(value-1, "a quote is not closed")
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
			p.loosen(i)
			p.extra++
		case c >= utf8.RuneSelf:
			ascii = false
		}
		i++
	}
}

// ending scans what stands behind the labels of a sample.
func (p *parser) ending(i int) {
	if i = p.number(i); i < 0 {
		return
	}
	p.stamp = p.stamp[:0]
	if p.buf[i] != '\n' || p.openMetrics {
		if i = p.lineEnd(i); i < 0 {
			return
		}
	}
	p.pos = i + 1
}

// number scans the value of a sample and the blanks before it. Its own pass
// takes what exporters write; the rest, and all that could overflow, is isOddNumber's.
func (p *parser) number(i int) int {
	b := p.buf
	if b[i] == ' ' {
		i = p.gap(i + 1)
	} else {
		p.loosen(i)
		i = p.blanks(i)
	}
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
	if n == 0 || n > 99 || b[j] > ' ' {
		for j = i; b[j] > ' '; {
			j++
		}
		if !isOddNumber(b[i:j]) {
			return p.fail(i, "expected a number as the value")
		}
	}
	p.value, p.valueEnd = i, j
	return j
}

// digits returns the index behind the digits that begin at i. All that is
// scanned ends in a newline, so there is no need to look for the end of b.
func digits(b []byte, i int) int {
	for len(b)-i >= 8 {
		x := binary.LittleEndian.Uint64(b[i:])
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

// lineEnd scans what may stand between the value of a sample and the newline, and
// returns where that is.
func (p *parser) lineEnd(i int) int {
	if i = p.timestamp(i); i < 0 {
		return i
	}
	if p.openMetrics {
		if i = p.exemplar(i); i < 0 {
			return i
		}
	}
	end := p.blanks(i)
	if p.buf[end] == '\r' {
		end++
	}
	if end > i {
		p.loosen(i)
	}
	if p.buf[end] != '\n' {
		return p.fail(end, "expected the line's end, or a timestamp of digits only, behind the value")
	}
	if p.openMetrics && p.loose > 0 {
		return p.fail(p.loose-1, "OpenMetrics has one blank before a value or timestamp, no other blanks, commas between labels, and no line end in a label value")
	}
	return end
}

// timestamp scans a timestamp and the blanks before it, if there is one.
func (p *parser) timestamp(i int) int {
	b := p.buf
	if p.openMetrics {
		return p.seconds(i)
	}
	j := p.blanks(i)
	if class[b[j]]&digit == 0 {
		return i
	}
	p.plain = p.plain && j == i+1 && b[i] == ' '
	stamp := j
	j = digits(b, j)
	p.stamp = b[stamp:j]
	if j-stamp > 18 {
		if _, err := strconv.ParseInt(string(p.stamp), 10, 64); err != nil {
			return p.fail(stamp, "a timestamp above 64 bits")
		}
	}
	return j
}

// seconds scans a timestamp of OpenMetrics, in seconds, and makes milliseconds of
// it. To multiply what was parsed would round twice, 1.001 to 1000: so three is
// added to the exponent before. Digits below the milliseconds go, as in Prometheus.
func (p *parser) seconds(i int) int {
	if p.buf[i] != ' ' || p.buf[i+1] == '#' {
		return i
	}
	stamp := i + 1
	for i = stamp; p.buf[i] > ' '; {
		i++
	}
	word := p.buf[stamp:i]
	p.clock = append(append(p.clock[:0], word...), "e3"...)
	if e := bytes.IndexAny(word, "eE"); e >= 0 {
		exponent, err := strconv.Atoi(string(word[e+1:]))
		if err != nil {
			exponent = math.MaxInt32
		}
		p.clock = strconv.AppendInt(p.clock[:e+1], int64(exponent)+3, 10)
	}
	ms, err := strconv.ParseFloat(string(p.clock), 64)
	if err != nil || !(ms >= 0 && ms < 1<<53) || bytes.ContainsAny(word, "_xX") {
		return p.fail(stamp, "expected a timestamp in seconds that is not negative")
	}
	p.clock = strconv.AppendInt(p.clock[:0], int64(ms), 10)
	p.stamp, p.plain = p.clock, false
	return i
}

// exemplar checks the exemplar behind a sample, if there is one, and drops it, as
// the text format has none.
func (p *parser) exemplar(i int) int {
	if !bytes.HasPrefix(p.buf[i:], []byte(" # {")) {
		return i
	}
	value, valueEnd, rest := p.value, p.valueEnd, p.rest
	p.labels, p.order = p.order[:0], p.labels
	p.rest, p.aside = i+len(" # {"), true
	if i = p.labelSet(p.rest); i >= 0 {
		i = p.number(i)
	}
	if i >= 0 && p.buf[i] == ' ' {
		stamp := i + 1
		if i = p.number(i); i >= 0 && bytes.ContainsAny(p.valueText(), "nN") {
			i = p.fail(stamp, "expected a timestamp in seconds")
		}
	}
	p.labels, p.order = p.order, p.labels
	p.value, p.valueEnd, p.rest, p.plain, p.aside = value, valueEnd, rest, false, false
	return i
}

// gap skips blanks where a plain line has none.
func (p *parser) gap(i int) int {
	if c := p.buf[i]; c != ' ' && c != '\t' {
		return i
	}
	p.loosen(i)
	return p.blanks(i)
}

// loosen notes what the text format allows at i, but neither its own encoder
// writes nor OpenMetrics allows.
func (p *parser) loosen(i int) {
	p.plain = false
	if p.loose == 0 {
		p.loose = i + 1
	}
}

// blanks skips blanks.
func (p *parser) blanks(i int) int {
	for p.buf[i] == ' ' || p.buf[i] == '\t' {
		i++
	}
	return i
}

// fail ends the body with a fault at i, unless the line only needs to be
// scanned again with more of it in the window. Not inlined, to keep the states small.
//
//go:noinline
func (p *parser) fail(i int, fault string) int {
	if !p.short {
		before := p.buf[p.start:i] // label values may hold newlines
		p.err = &syntaxError{p.line + bytes.Count(before, []byte("\n")), len(before) - bytes.LastIndexByte(before, '\n'), fault}
	}
	return -1
}

// hasLabel reports whether the sample has a label of that name.
func (p *parser) hasLabel(name []byte) bool {
	return slices.ContainsFunc(p.labels, func(l label) bool { return bytes.Equal(p.labelName(l), name) })
}

// repeatsLabel reports whether two labels of the sample have one name.
func (p *parser) repeatsLabel() bool {
	same := func(a, b label) bool { return bytes.Equal(p.labelName(a), p.labelName(b)) }
	return len(slices.CompactFunc(p.byName(), same)) < len(p.labels)
}

// byName returns the labels of the sample in the order of their names.
func (p *parser) byName() []label {
	p.order = append(p.order[:0], p.labels...)
	slices.SortFunc(p.order, func(a, b label) int {
		return bytes.Compare(p.labelName(a), p.labelName(b))
	})
	return p.order
}

// seen returns the bits of all label names of the sample, see nameBit.
func (p *parser) seen() uint64 {
	if n := len(p.labels); n > 0 {
		return p.labels[n-1].seen
	}
	return 0
}

// valueText returns the value of the sample, as written.
func (p *parser) valueText() []byte { return p.buf[p.value:p.valueEnd] }

// tail returns what stands behind the name of the sample and its brace, newline included.
func (p *parser) tail() []byte { return p.buf[p.rest:p.pos] }

// labelName returns the name of a label of the sample, as written.
func (p *parser) labelName(l label) []byte {
	return p.buf[p.start+int(l.name) : p.start+int(l.nameEnd)]
}

// labelText returns the value of a label of the sample, as written.
func (p *parser) labelText(l label) []byte {
	return p.buf[p.start+int(l.value) : p.start+int(l.end)-1]
}

// nameBit maps a label name to one of 64 bits: names of different bits differ.
func nameBit(name []byte) uint64 {
	n := len(name)
	return 1 << ((int(name[0]) + 3*int(name[n-1]) + 11*n) & 63)
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

// isEscape reports whether c behind a backslash makes an escape in a label value.
func isEscape(c byte) bool {
	return c == '\\' || c == '"' || c == 'n'
}

// ones times a byte is that byte eight times; highs are the high bits of all.
const ones, highs = 0x0101010101010101, 0x8080808080808080

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

// isOddNumber reports whether a word is a number, however it is written.
// Hexadecimal digits and underscores are Go's, not the format's.
func isOddNumber(word []byte) bool {
	_, err := strconv.ParseFloat(string(word), 64)
	return err == nil && !bytes.ContainsAny(word, "_xX")
}

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
