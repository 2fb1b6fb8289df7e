// This file turns many scrapes into one run: first the waterfall, behind which
// every source stands, then the commands it was made for.
//
// A waterfall gives each scrape a ticket for a fetch that is waiting or running
// anyway, or queues one. Scrapes that give up hand their tickets back; a fetch
// without tickets is cancelled. Results stay with the waterfall: a ticket only
// keeps the newest of its key from being dropped. Who takes a result gives it back,
// so that its buffers can be used again.

package main

import (
	"bytes"
	"cmp"
	"compress/flate"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
)

// ---- Sources

// source is one part of the appliance, behind its waterfall.
type source struct {
	name     string
	kind     string // http, file or exec
	origin   string // where it comes from, without secrets
	maxBytes int64
	interval time.Duration
	paths    []string
	labels   map[string]string
	raw      bool
	require  bool
	added    addedLabels
	command  *command  // of an exec source
	exporter *exporter // of an http source
	pattern  string    // of a file source
	waterfall

	status  status
	windows *sync.Pool // of *workspace, shared by all sources
	buffers buffers
}

// arguments returns what a query has for the source. An error names a parameter.
func (s *source) arguments(query url.Values) (a arguments, err error) {
	a.standard = true
	switch {
	case s.command != nil:
		if a.values, a.standard, err = s.command.values(query); len(a.values) > 0 {
			a.id = fmt.Sprintf("%q", a.values)
		}
	case s.exporter != nil && s.exporter.params != nil:
		handed := url.Values{}
		for name, given := range query {
			if name != "exporter_name" && (slices.Contains(s.exporter.params, "*") || slices.Contains(s.exporter.params, name)) {
				handed[name] = given
			}
		}
		a.id = handed.Encode()
		a.values, a.standard = []string{a.id}, a.id == ""
	}
	return a, err
}

// check looks at the file that a source names.
func (s *source) check() error {
	switch {
	case s.kind == "exec":
		_, err := exec.LookPath(s.origin)
		return err
	case s.kind == "file" && !hasMeta(s.pattern):
		file, _, err := openRegular(s.pattern)
		file.Close()
		return err
	}
	return nil
}

// result is what one fetch yields. It is immutable while anybody has it.
type result struct {
	bodies  []*exposition // in order; empty if all of it failed
	failure *failure      // nil if the source is up
	bytes   int64         // of body, decompressed
	files   []fileTime
	start   time.Time
	end     time.Time
	lease
}

// A lease is shared by all who hold a result: its waterfall, scrapes and pages. When
// the last of them lets go, the result's buffers serve the source's next fetch. The
// garbage collector could do that, but a plain scrape of 2 × 1 MB then takes 45 % more.
type lease struct {
	holders atomic.Int32
	buffers *buffers // nil until there is one to give back
}

// hold adds a holder. The caller must be one already, or have just made the result.
func (r *result) hold() { r.holders.Add(1) }

// release takes a holder away. A holder that forgets to leaves the buffers to the
// garbage collector, which is safe.
func (r *result) release() {
	if r.holders.Add(-1) > 0 || r.buffers == nil {
		return
	}
	for _, e := range r.bodies {
		r.buffers.put(e.buf)
	}
}

// buffers are what the bodies of a source are read into.
type buffers struct {
	pool  sync.Pool    // of *[]byte
	size  atomic.Int64 // of the last body with its labels: the next is likely to be as large
	spoil func([]byte) // overwrites what is given back; for tests
}

// get returns an empty buffer that the next body is likely to fit in.
func (bs *buffers) get() []byte {
	if buf, ok := bs.pool.Get().(*[]byte); ok {
		return (*buf)[:0]
	}
	return make([]byte, 0, bs.size.Load())
}

// put keeps a buffer for the next body, unless most of it was not used.
func (bs *buffers) put(buf []byte) {
	if bs.spoil != nil {
		bs.spoil(buf)
	}
	bs.size.Store(int64(len(buf) + len(buf)/16))
	if len(buf) >= cap(buf)/4 {
		bs.pool.Put(&buf)
	}
}

// samples counts the samples of all bodies.
func (r *result) samples() int {
	n := 0
	for _, e := range r.bodies {
		n += e.samples
	}
	return n
}

// quoted reports whether a name in one of the bodies needs quotes.
func (r *result) quoted() bool {
	return slices.ContainsFunc(r.bodies, func(e *exposition) bool { return e.quoted })
}

// fileTime is when a file that was read had last been modified.
type fileTime struct {
	name  string
	mtime time.Time
}

// failure is why a fetch failed.
type failure struct {
	reason string // as in reverse_exporter_source_failures_total
	err    error  // for the log and the page at /
	detail string // the end of standard error, for the log only
}

// fail returns a failure of the reason.
func fail(reason, format string, args ...any) *failure {
	return &failure{reason: reason, err: fmt.Errorf(format, args...)}
}

// ---- The waterfall

// waterfall lets many scrapes share few fetches. Set the first fields, then use
// join, wait, take and leave.
type waterfall struct {
	fetch   func(ctx context.Context, r *result, values []string) *failure // adds to the result what it finds
	count   func(standard bool, r *result) (tell func())                   // counts a fetch, and returns what logs it
	life    context.Context                                                // ends all fetches
	timeout time.Duration                                                  // of a fetch, from its start
	maxAge  time.Duration                                                  // for which a success is served again
	pinned  bool                                                           // the last result is served until there is another
	serial  bool                                                           // one run at a time, not one for each key
	places  int                                                            // keys that may be here beside the standard and a running one

	mu   sync.Mutex // guards all below, with the keys, fetches and tickets
	keys map[string]*key
	line lane // the one of a serial waterfall
	runs sync.WaitGroup
}

// arguments are what a scraper chose of what a source lets it choose.
type arguments struct {
	id       string // tells them from all others
	values   []string
	standard bool // they are the defaults
}

// key is one choice of arguments, and what is under way or kept for it.
type key struct {
	arguments
	line    *lane
	next    *fetch      // waiting, or running and not cancelled; nil if there is none
	newest  *result     // nil before the first and once nobody needs it
	tickets int         // handed out and not handed back
	expiry  *time.Timer // drops newest, if it is kept for a time
}

// lane is where fetches run one after another, in order of arrival.
type lane struct {
	running *fetch // it may be cancelled: it stays until it has really ended
	waiting []*fetch
}

// fetch is one run, from when it is queued.
type fetch struct {
	key       *key
	tickets   []*ticket // of those who want it
	cancel    context.CancelFunc
	started   time.Time // zero while it waits
	ended     bool
	cancelled bool
	expired   bool // cancelled because the deadline of its last waiter passed
}

// ticket is one scrape's share in a key.
type ticket struct {
	key   *key
	fetch *fetch    // the one to wait for, nil if a kept result will do
	place int       // in fetch.tickets
	wake  sync.Cond // waits for fetch.ended, or for the context of wait to be done
}

// Results of scrapes that get none: whose deadline passed while the fetch ran, or
// before it began, and for whose arguments there was no place.
var (
	missed  = &result{failure: fail("timeout", "no result before the deadline of the scrape")}
	crowded = &result{failure: fail("busy", "still in line at the deadline of the scrape")}
	refused = &result{failure: fail("busy", "too many different arguments at once")}
)

// join gives a scrape a share in the fetch of a key that is waiting or running,
// queues one if there is none, or lets a result do that is kept, unless refresh
// is set. It returns nil if too many other keys are here.
func (w *waterfall) join(a arguments, refresh bool) *ticket {
	w.mu.Lock()
	defer w.mu.Unlock()
	k := w.keys[a.id]
	if k == nil {
		if !a.standard && !w.makeRoom() {
			return nil
		}
		k = w.addKey(a)
	}
	k.tickets++
	t := &ticket{key: k}
	t.wake.L = &w.mu
	if !refresh && w.keeps(k.newest) {
		return t
	}
	if k.next == nil {
		k.next = &fetch{key: k}
		k.line.waiting = append(k.line.waiting, k.next)
		w.advance(k.line)
	}
	t.fetch = k.next
	t.place = len(t.fetch.tickets)
	t.fetch.tickets = append(t.fetch.tickets, t)
	return t
}

// wait waits until the fetch of a ticket has ended or ctx is done.
func (w *waterfall) wait(ctx context.Context, t *ticket) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t.fetch == nil || t.fetch.ended {
		return
	}
	stop := context.AfterFunc(ctx, func() {
		w.mu.Lock() // or the signal could come before the wait
		defer w.mu.Unlock()
		t.wake.Signal()
	})
	defer stop()
	for !t.fetch.ended && ctx.Err() == nil {
		t.wake.Wait()
	}
}

// take returns the newest result of a ticket's key that ended after the ticket
// was handed out, or was good enough then.
func (w *waterfall) take(t *ticket) *result {
	w.mu.Lock()
	defer w.mu.Unlock()
	r := missed
	switch {
	case t.fetch == nil || t.fetch.ended:
		r = t.key.newest
	case t.fetch.started.IsZero():
		r = crowded
	}
	r.hold()
	return r
}

// leave hands a ticket back. A fetch that nobody wants any more is taken out of
// the line, or cancelled; late says that it took too long for the last scrape,
// and is a timeout of the source if it had a second at least. It reports whether the
// fetch was still in line.
func (w *waterfall) leave(t *ticket, late bool) (inLine bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.key.tickets--
	inLine = t.fetch != nil && t.fetch.started.IsZero()
	if f := t.fetch; f != nil && !f.ended {
		last := len(f.tickets) - 1
		f.tickets[t.place] = f.tickets[last]
		f.tickets[t.place].place = t.place
		f.tickets[last] = nil
		if f.tickets = f.tickets[:last]; last == 0 {
			w.abandon(f, late)
		}
	}
	w.tidy(t.key)
	return inLine
}

// abandon ends a fetch that nobody waits for.
func (w *waterfall) abandon(f *fetch, late bool) {
	f.key.next = nil
	if f.started.IsZero() {
		line := f.key.line
		line.waiting = slices.DeleteFunc(line.waiting, func(other *fetch) bool { return other == f })
		return
	}
	f.cancelled = true
	f.expired = late && time.Since(f.started) >= time.Second
	f.cancel()
}

// advance starts the next fetch of a line, if none is running.
func (w *waterfall) advance(line *lane) {
	if line.running != nil || len(line.waiting) == 0 || w.life.Err() != nil {
		return
	}
	f := line.waiting[0]
	line.waiting[0] = nil
	line.waiting = line.waiting[1:]
	line.running = f
	f.started = time.Now()
	ctx, cancel := context.WithTimeout(w.life, w.timeout)
	f.cancel = cancel
	w.runs.Go(func() { w.run(ctx, f) })
}

// run runs a fetch to its end, hands out its result and lets the next begin. The
// fetch counts unless its clients left it; what it came to is logged unlocked.
func (w *waterfall) run(ctx context.Context, f *fetch) {
	r := w.guard(ctx, f.key.values)
	if tell := w.finish(f, r); tell != nil {
		tell()
	}
}

// finish ends a fetch. It returns what logs it, nil if it does not count.
func (w *waterfall) finish(f *fetch, r *result) (tell func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f.cancel()
	f.ended = true
	k := f.key
	if f.expired {
		tell = w.count(k.standard, missed)
	} else if !f.cancelled && w.life.Err() == nil {
		tell = w.count(k.standard, r)
	}
	if !f.cancelled {
		k.next = nil
		w.keep(k, r)
		for _, t := range f.tickets {
			t.wake.Signal()
		}
	}
	k.line.running = nil
	w.advance(k.line)
	w.tidy(k)
	return tell
}

// keep makes a result the newest of its key, and has it dropped in time.
func (w *waterfall) keep(k *key, r *result) {
	k.replace(r)
	if w.maxAge > 0 && r.failure == nil {
		k.expiry = time.AfterFunc(w.maxAge, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.tidy(k)
		})
	}
}

// replace makes a result the newest of the key, nil to have none.
func (k *key) replace(r *result) {
	if r != nil {
		r.hold()
	}
	if k.newest != nil {
		k.newest.release()
	}
	k.newest = r
}

// guard fetches, with what all fetches have in common: times, the deadline, and that
// a panic is a failure of the source.
func (w *waterfall) guard(ctx context.Context, values []string) (r *result) {
	r = &result{start: time.Now()}
	defer func() {
		if v := recover(); v != nil {
			r.bodies = nil
			r.failure = fail("internal", "a fault in reverse_exporter: %v", v)
			r.failure.detail = string(debug.Stack())
		}
		r.end = time.Now()
	}()
	r.failure = w.fetch(ctx, r, values)
	if r.failure != nil && ctx.Err() == context.DeadlineExceeded {
		r.failure.reason, r.failure.err = "timeout", fmt.Errorf("not done within %v, see --timeout", w.timeout)
	}
	return r
}

// tidy drops what nobody needs any more of a key.
func (w *waterfall) tidy(k *key) {
	if k.tickets == 0 && !w.keeps(k.newest) {
		k.replace(nil)
	}
	if k.newest == nil && k.idle() && w.keys[k.id] == k {
		delete(w.keys, k.id)
	}
}

// keeps reports whether a result is served to scrapes that come after it.
func (w *waterfall) keeps(r *result) bool {
	return r != nil && (w.pinned || r.failure == nil && time.Since(r.end) < w.maxAge)
}

// idle reports whether nobody has a share in the key and nothing of it runs.
func (k *key) idle() bool {
	return k.tickets == 0 && k.next == nil && (k.line.running == nil || k.line.running.key != k)
}

// makeRoom reports whether there is a place for another key. If need be it drops
// the oldest result that is only kept.
func (w *waterfall) makeRoom() bool {
	taken := 0
	var oldest *key
	for _, k := range w.keys {
		if k.standard {
			continue
		}
		taken++
		if k.idle() && (oldest == nil || k.newest.end.Before(oldest.newest.end)) {
			oldest = k
		}
	}
	places := w.places
	if w.line.running != nil && !w.line.running.key.standard {
		places++
	}
	if taken >= places && oldest != nil {
		oldest.expiry.Stop()
		oldest.replace(nil)
		delete(w.keys, oldest.id)
		taken--
	}
	return taken < places
}

// addKey adds a key, with a lane of its own unless the waterfall is serial.
func (w *waterfall) addKey(a arguments) *key {
	k := &key{arguments: a, line: &w.line}
	if !w.serial {
		k.line = &lane{}
	}
	if w.keys == nil {
		w.keys = map[string]*key{}
	}
	w.keys[a.id] = k
	return k
}

// ---- Reading a body

// readBody reads one more body into a result.
func (s *source) readBody(r *result, in *body, openMetrics bool) *failure {
	in.limit = s.maxBytes - r.bytes
	budget := min(4*s.maxBytes, math.MaxUint32, math.MaxInt)
	for _, e := range r.bodies {
		budget -= int64(e.held())
	}
	w, ok := s.windows.Get().(*workspace)
	if !ok {
		w = &workspace{}
	}
	defer s.windows.Put(w)
	r.buffers, w.body = &s.buffers, s.buffers.get()
	e, err := labelBody(in, openMetrics, &s.added, w, int(budget))
	if w.body != nil {
		s.buffers.put(w.body)
	}
	r.bytes += in.n
	if err != nil {
		return readFailure(err)
	}
	r.bodies = append(r.bodies, e)
	return nil
}

// body reads what a source delivers: it counts, and ends at its limit or when
// its context is done.
type body struct {
	ctx      context.Context
	src      io.Reader
	n, limit int64

	untilClose bool // only its last newline tells that it was not cut short
	last       byte
}

func (b *body) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := b.src.Read(p)
	if b.n += int64(n); b.n > b.limit {
		return 0, errTooLarge
	}
	if n > 0 {
		b.last = p[n-1]
	}
	if b.untilClose && err == io.EOF && b.n > 0 && b.last != '\n' {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// readFailure says why a body could not be taken.
func readFailure(err error) *failure {
	var fault *syntaxError
	var corrupt flate.CorruptInputError
	switch {
	case errors.Is(err, errTooLarge):
		return &failure{reason: "too_large", err: err}
	case errors.As(err, &fault):
		return &failure{reason: "parse", err: err}
	case errors.Is(err, gzip.ErrChecksum), errors.Is(err, gzip.ErrHeader), errors.As(err, &corrupt):
		return fail("encoding", "the body is not whole gzip, as its header says: %w", err)
	}
	return fail("read", "failed to read the body to its end: %w", err)
}

// endsOpenMetrics reports whether the last line of a body is # EOF, which makes it
// OpenMetrics where no header tells.
func endsOpenMetrics(body []byte) bool {
	line := bytes.TrimSuffix(body, []byte("\n"))
	return bytes.HasSuffix(line, []byte("# EOF")) && (len(line) == 5 || line[len(line)-6] == '\n')
}

// ---- Exporters

// exporter is what an http source fetches from.
type exporter struct {
	url      *url.URL
	socket   string   // path of the Unix socket that it is at, "" for TCP
	params   []string // URL parameters that are handed on, * for all
	insecure bool     // its certificate is not verified
	client   http.Client

	fixed       http.Header // headers from the command line
	headerFiles *watched    // nil without
	headers     atomic.Pointer[http.Header]
	caFile      *watched // nil without
	roots       atomic.Pointer[x509.CertPool]
}

// accept asks for the text format. Some exporters answer 406 without it.
const accept = "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"

// timeoutHeader tells how long a scraper waits, in seconds.
const timeoutHeader = "X-Prometheus-Scrape-Timeout-Seconds"

// setURL makes s an exporter.
func (s *source) setURL(text string) error {
	u, socket, err := parseURL(text)
	if err != nil {
		return err
	}
	s.origin = u.Scheme + "://" + u.Host + u.Path
	if socket != "" {
		s.origin = "http://unix:" + socket + ":" + u.Path
	}
	fixed := http.Header{}
	if u.User != nil { // as a header, so that redirects keep it and no error tells it
		password, _ := u.User.Password()
		fixed.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.User.Username()+":"+password)))
		u.User = nil
	}
	s.exporter = &exporter{url: u, socket: socket, fixed: fixed}
	s.exporter.headers.Store(&fixed)
	s.exporter.client = http.Client{CheckRedirect: stayThere, Transport: &http.Transport{ // without a proxy from the environment
		DialContext:            s.dial,
		DialTLSContext:         s.dialTLS,
		DisableCompression:     true, // it would hide that the body was compressed
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConnsPerHost:    2,
		IdleConnTimeout:        5 * time.Minute,
	}}
	s.places, s.fetch = 128, s.fetchHTTP
	return nil
}

// parseURL parses a URL, or what nginx writes for one at a Unix socket.
func parseURL(text string) (u *url.URL, socket string, err error) {
	rest, isSocket := strings.CutPrefix(text, "http://unix:")
	if isSocket {
		socket, rest, _ = strings.Cut(rest, ":")
		text = "http://localhost" + rest
	}
	u, err = url.Parse(text)
	switch {
	case err != nil:
		return nil, "", errors.New("this is no URL")
	case u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", !isPort(u.Port(), true), strings.HasSuffix(u.Host, ":"), isSocket && socket == "":
		return nil, "", errors.New("a URL is needed, as http://localhost:9100/metrics or http://unix:/run/x.sock:/metrics")
	case u.Path == "":
		u.Path = "/metrics"
	}
	u.Fragment = ""
	return u, socket, nil
}

// isPort reports whether text is a port, or is empty if it may be.
func isPort(text string, mayBeEmpty bool) bool {
	_, err := strconv.ParseUint(text, 10, 16)
	return err == nil || text == "" && mayBeEmpty
}

// isHTTPS reports whether s is an exporter with TLS.
func (s *source) isHTTPS() bool { return s.exporter != nil && s.exporter.url.Scheme == "https" }

// fetchHTTP scrapes the exporter, with the query in values beside its own.
func (s *source) fetchHTTP(ctx context.Context, r *result, values []string) *failure {
	u := *s.exporter.url
	u.RawQuery = strings.Trim(u.RawQuery+"&"+strings.Join(values, ""), "&")
	header := http.Header{
		"Accept":          {accept},
		"Accept-Encoding": {"identity"},
		"User-Agent":      {"reverse_exporter/" + version},
		timeoutHeader:     {strconv.FormatFloat((s.timeout - margin(s.timeout)).Seconds(), 'f', -1, 64)},
	}
	s.exporter.headerFiles.refresh()
	maps.Copy(header, *s.exporter.headers.Load())
	req := (&http.Request{Method: "GET", URL: &u, Header: header, Host: header.Get("Host")}).WithContext(ctx)
	resp, err := s.exporter.client.Do(req)
	if err != nil {
		return s.httpFailure(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fail("status", "the exporter answered %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	}
	openMetrics, f := checkContentType(resp.Header.Get("Content-Type"))
	if f != nil {
		return f
	}
	in := &body{ctx: ctx, src: resp.Body, untilClose: resp.ContentLength < 0 && len(resp.TransferEncoding) == 0}
	switch encoding := strings.ToLower(resp.Header.Get("Content-Encoding")); encoding {
	case "", "identity":
	case "gzip":
		in.untilClose = false // it has an end of its own
		if in.src, err = gzip.NewReader(resp.Body); err != nil {
			return readFailure(err)
		}
	default:
		return fail("encoding", "the body has a Content-Encoding that was not asked for")
	}
	return s.readBody(r, in, openMetrics)
}

// checkContentType tells OpenMetrics from the text format and refuses all else.
func checkContentType(header string) (openMetrics bool, f *failure) {
	mediaType, _, err := mime.ParseMediaType(header)
	switch {
	case header == "", mediaType == "text/plain":
		return false, nil
	case mediaType == "application/openmetrics-text":
		return true, nil
	case mediaType == "text/html":
		return false, fail("content_type", "the exporter answered with HTML: is the path right?")
	case err != nil && mediaType == "":
		return false, fail("content_type", "the Content-Type of the answer is malformed")
	}
	return false, fail("content_type", "the exporter answered with %.60q, text/plain or OpenMetrics is needed", mediaType)
}

// httpFailure says why there was no answer. The error of net/http names the URL,
// and may quote the answer: both can hold secrets.
func (s *source) httpFailure(err error) *failure {
	err = withoutURL(err)
	var op *net.OpError
	var cert *tls.CertificateVerificationError
	var unknown x509.UnknownAuthorityError
	var record tls.RecordHeaderError
	var alert tls.AlertError
	switch {
	case errors.Is(err, errRedirect), errors.Is(err, errRedirects):
		return &failure{reason: "status", err: err}
	case errors.Is(err, http.ErrSchemeMismatch), errors.As(err, &record):
		return fail("tls", "the exporter does not speak TLS")
	case errors.As(err, &unknown):
		return fail("tls", "%w; give its CA: --ca-file %s:FILE", err, s.name)
	case errors.As(err, &cert), errors.As(err, &alert):
		return &failure{reason: "tls", err: err}
	case errors.As(err, &op) && op.Op == "dial":
		return &failure{reason: "connect", err: err}
	case errors.As(err, &op), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fail("read", "failed to read the answer: %w", err)
	}
	return fail("read", "the answer is no valid HTTP, or its headers are too long")
}

// withoutURL returns the error of a request without the URL, which may hold secrets.
func withoutURL(err error) error {
	var withURL *url.Error
	if errors.As(err, &withURL) {
		return withURL.Err
	}
	return err
}

// dial connects to the exporter. The context of a dial is not that of the fetch.
func (s *source) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if s.exporter.socket != "" {
		network, addr = "unix", s.exporter.socket
	}
	dialer := net.Dialer{Timeout: s.timeout}
	conn, err := dialer.DialContext(ctx, network, addr)
	var unresolved *net.DNSError
	if errors.As(err, &unresolved) && unresolved.Name == "localhost" { // there is no /etc/hosts
		return dialer.DialContext(ctx, network, strings.Replace(addr, "localhost", "127.0.0.1", 1))
	}
	return conn, err
}

// dialTLS connects to an https exporter, and verifies its certificate against those
// that are in the CA file by now.
func (s *source) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	conn, err := s.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	e := s.exporter
	e.caFile.refresh()
	secure := tls.Client(conn, &tls.Config{ServerName: e.url.Hostname(), RootCAs: e.roots.Load(), InsecureSkipVerify: e.insecure})
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return secure, nil
}

// Failures of exporters that send their scraper elsewhere, or in circles.
var (
	errRedirect  = errors.New("a redirect to another scheme, host or port")
	errRedirects = errors.New("more than 10 redirects")
)

// stayThere follows redirects within one scheme, host and port.
func stayThere(req *http.Request, via []*http.Request) error {
	if req.URL.Scheme != via[0].URL.Scheme || req.URL.Host != via[0].URL.Host {
		return errRedirect
	}
	if len(via) >= 10 {
		return errRedirects
	}
	return nil
}

// takeHeaders keeps the headers that header files hold beside those of the command
// line.
func (e *exporter) takeHeaders(texts [][]byte) error {
	headers := e.fixed.Clone()
	for i, text := range texts {
		err := eachLine(text, func(line string) error {
			key, value, err := parseHeader(line)
			headers.Add(key, value)
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", e.headerFiles.names[i], err)
		}
	}
	e.headers.Store(&headers)
	return nil
}

// parseHeader parses a header line for an exporter. Its error does not quote it.
func parseHeader(line string) (key, value string, err error) {
	key, value, ok := strings.Cut(line, ":")
	key, value = http.CanonicalHeaderKey(key), strings.TrimSpace(value)
	odd := func(c rune) bool { return c <= ' ' || c > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, c) }
	control := func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }
	switch {
	case !ok || key == "" || strings.ContainsFunc(key, odd):
		err = errors.New("a header is needed, as 'Authorization: Bearer x', or @FILE for a file of such lines")
	case strings.ContainsFunc(value, control):
		err = fmt.Errorf("the value of %s has a control character", key)
	case slices.Contains(ownHeaders, key):
		err = fmt.Errorf("%s is set by the program", key)
	}
	return key, value, err
}

// ownHeaders are those of the connection, and those that the body that comes back
// and its timing depend on.
var ownHeaders = []string{"Accept-Encoding", "Connection", "Content-Length", "Expect", "Keep-Alive", "Proxy-Connection",
	"Te", "Trailer", "Transfer-Encoding", "Upgrade", timeoutHeader}

// takeRoots keeps the certificates that the exporter's is verified against.
func (e *exporter) takeRoots(texts [][]byte) error {
	roots, err := newPool(texts[0])
	if err == nil {
		e.roots.Store(roots)
	}
	return err
}

// newPool returns the certificates in a PEM file.
func newPool(text []byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, errors.New("no certificate in PEM is in it")
	}
	return pool, nil
}

// watched are files that are read again when they change on disk. What cannot be
// taken then is logged once, and leaves the program with what it had.
type watched struct {
	flag  string // that names them
	names []string
	take  func(texts [][]byte) error // keeps what they hold
	log   *slog.Logger

	mu     sync.Mutex    // guards seen
	seen   []os.FileInfo // as they were when they were last read, nil for one that was not there
	broken atomic.Bool   // they could not be taken when last read
}

// load reads the files.
func (w *watched) load() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = w.look()
	return w.read()
}

// refresh reads the files again if one has changed. Nobody waits for another who is
// at it: the disk may be slow.
func (w *watched) refresh() {
	if w == nil || !w.mu.TryLock() {
		return
	}
	defer w.mu.Unlock()
	now := w.look()
	if slices.EqualFunc(now, w.seen, sameFile) {
		return
	}
	w.seen = now
	err := w.read()
	if w.broken.Store(err != nil); err != nil {
		w.log.Error("a changed file cannot be taken up: what it held before stays in use", "err", err)
	} else {
		w.log.Info("a changed file was taken up", "flag", w.flag)
	}
}

// look returns what tells whether the files have changed.
func (w *watched) look() []os.FileInfo {
	infos := make([]os.FileInfo, len(w.names))
	for i, name := range w.names {
		infos[i], _ = os.Stat(name)
	}
	return infos
}

// sameFile reports whether a file is as it was.
func sameFile(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// maxFile is the largest file that a flag may name, in bytes.
const maxFile = 1 << 20

// read reads the files whole and has them taken.
func (w *watched) read() error {
	var texts [][]byte
	for _, name := range w.names {
		file, _, err := openRegular(name)
		if err != nil {
			return fmt.Errorf("%s: %w", w.flag, err)
		}
		text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
		file.Close()
		if err != nil || len(text) > maxFile {
			return fmt.Errorf("%s: %s cannot be read, or is larger than 1 MiB", w.flag, name)
		}
		texts = append(texts, text)
	}
	if err := w.take(texts); err != nil {
		return fmt.Errorf("%s: %w", w.flag, err)
	}
	return nil
}

// eachLine calls take for each line that says something, without the blanks around
// it, until one fails.
func eachLine(text []byte, take func(line string) error) error {
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		if err := take(line); err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
	return nil
}

// ---- Files

// setPattern makes s a pattern of files.
func (s *source) setPattern(pattern string) error {
	s.pattern, s.origin = pattern, pattern
	s.serial, s.fetch = true, s.fetchFiles
	if _, err := filepath.Match(pattern, ""); err != nil || pattern == "" {
		return errors.New("a file name or a glob is needed")
	}
	return nil
}

// fetchFiles reads the files of the pattern. Those that are whole are served even
// if others fail.
func (s *source) fetchFiles(ctx context.Context, r *result, _ []string) *failure {
	names, _ := filepath.Glob(s.pattern)
	if len(names) == 0 && !hasMeta(s.pattern) {
		names = []string{s.pattern}
	}
	var failed *failure
	for _, name := range names {
		failed = cmp.Or(failed, s.readFile(ctx, r, name))
	}
	return failed
}

// hasMeta reports whether a pattern is more than the name of one file.
func hasMeta(pattern string) bool { return strings.ContainsAny(pattern, `*?[\`) }

// readFile adds one file to a result. It takes nothing of a file that changes
// while it is read.
func (s *source) readFile(ctx context.Context, r *result, name string) *failure {
	file, before, err := openRegular(name)
	if err != nil {
		return &failure{reason: "file", err: err}
	}
	defer file.Close()
	r.files = append(r.files, fileTime{name, before.ModTime()})
	bodies := len(r.bodies)
	if f := s.readBody(r, &body{ctx: ctx, src: file}, endsOpenMetrics(readEnd(file, before.Size()))); f != nil {
		f.err = fmt.Errorf("%s: %w", name, f.err)
		return f
	}
	after, err := file.Stat()
	if err != nil || after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
		r.bodies = r.bodies[:bodies]
		return fail("file", "%s changed while it was read: write it elsewhere and rename it", name)
	}
	return nil
}

// openRegular opens a file, unless it is none that can be read to an end: to open a
// device may do something, and a FIFO would wait for its writer.
func openRegular(name string) (*os.File, os.FileInfo, error) {
	info, err := os.Stat(name)
	if err == nil && !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is no regular file", name)
	}
	file, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	if info, err = file.Stat(); err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", name)
	}
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

// readEnd returns the last bytes of a file, enough to see its last line if that is
// short.
func readEnd(file *os.File, size int64) []byte {
	end := make([]byte, min(size, 8))
	n, _ := file.ReadAt(end, size-int64(len(end)))
	return end[:n]
}

// ---- Commands

// setCommand makes s a command.
func (s *source) setCommand(line string) (err error) {
	s.command, err = parseCommand(line)
	if err == nil {
		s.origin = s.command.words[0][0].text
	}
	s.serial, s.places, s.fetch = true, 16, s.fetchCommand
	return err
}

// fetchCommand runs the command and takes its output.
func (s *source) fetchCommand(ctx context.Context, r *result, values []string) *failure {
	out, failure := s.command.run(ctx, values, s.timeout, s.maxBytes)
	if failure != nil {
		r.bytes = int64(len(out))
		return failure
	}
	return s.readBody(r, &body{ctx: ctx, src: bytes.NewReader(out)}, endsOpenMetrics(out))
}

// command is a command line: words, each made of pieces, and the URL parameters
// that some of the pieces take.
type command struct {
	words  [][]piece
	params []param
}

// piece is a part of a word: fixed text, or the value of a parameter.
type piece struct {
	text  string
	param int // index in command.params, -1 for fixed text
}

// param is a URL parameter that a command takes.
type param struct {
	name    string
	choices []string // the default first; none if there is no default
	listed  bool     // no other values than the choices are taken
}

// parseCommand parses a command line: words by the shell's rules of quoting, and
// placeholders in them.
func parseCommand(line string) (*command, error) {
	words, err := splitWords(line)
	if err != nil {
		return nil, err
	}
	if len(words) == 0 || words[0] == "" {
		return nil, errors.New("there is no command")
	}
	c := &command{}
	for _, w := range words {
		pieces, err := c.parseWord(w)
		if err != nil {
			return nil, err
		}
		c.words = append(c.words, pieces)
	}
	if len(c.words[0]) != 1 || c.words[0][0].param >= 0 {
		return nil, errors.New("the command itself cannot be a placeholder")
	}
	return c, nil
}

// splitWords splits a line as a shell does: at blanks, but for those quoted by
// '…', "…" or a backslash.
func splitWords(line string) ([]string, error) {
	var words []string
	var word []byte
	inWord, quote := false, byte(0)
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case quote == 0 && (c == ' ' || c == '\t' || c == '\n'):
			if inWord {
				words = append(words, string(word))
				word, inWord = word[:0], false
			}
			continue
		case c == quote:
			quote = 0
		case quote == 0 && (c == '\'' || c == '"'):
			quote = c
		case c == '\\' && quote != '\'':
			if i++; i == len(line) {
				return nil, errors.New(`a \ with nothing behind it`)
			}
			if line[i] == '\n' { // both go, and are no word of their own
				continue
			}
			if quote == '"' && strings.IndexByte("\"\\$`", line[i]) < 0 {
				word = append(word, '\\')
			}
			word = append(word, line[i])
		default:
			word = append(word, c)
		}
		inWord = true
	}
	if quote != 0 {
		return nil, fmt.Errorf("the quote %c is not closed", quote)
	}
	if inWord {
		words = append(words, string(word))
	}
	return words, nil
}

// parseWord cuts a word into pieces at its placeholders.
func (c *command) parseWord(word string) ([]piece, error) {
	var pieces []piece
	text := ""
	for len(word) > 0 {
		i := strings.IndexAny(word, "{}")
		if i < 0 {
			i = len(word)
		}
		text += word[:i]
		word = word[i:]
		switch {
		case strings.HasPrefix(word, "{{"), strings.HasPrefix(word, "}}"):
			text += word[:1]
			word = word[2:]
		case word != "":
			inside, rest, closed := strings.Cut(word[1:], "}")
			if word[0] == '}' || !closed {
				return nil, errors.New("a brace without its other half: {{ and }} are literal braces")
			}
			n, err := c.addParam(inside)
			if err != nil {
				return nil, err
			}
			if text != "" {
				pieces = append(pieces, piece{text, -1})
			}
			pieces = append(pieces, piece{"", n})
			word, text = rest, ""
		}
	}
	if text != "" || len(pieces) == 0 {
		pieces = append(pieces, piece{text, -1})
	}
	return pieces, nil
}

// addParam adds the parameter of a placeholder, NAME, NAME=DEFAULT or
// NAME=ONE|OTHER, and returns its index.
func (c *command) addParam(inside string) (int, error) {
	name, choices, hasDefault := strings.Cut(inside, "=")
	if !isParamName(name) {
		return 0, fmt.Errorf("{%s} is no placeholder: write {{ and }} for literal braces", inside)
	}
	p := param{name: name, listed: strings.Contains(choices, "|")}
	if hasDefault {
		p.choices = strings.Split(choices, "|")
	}
	i := slices.IndexFunc(c.params, func(other param) bool { return other.name == name })
	if i < 0 {
		i = len(c.params)
		c.params = append(c.params, p)
	} else if hasDefault && !slices.Equal(c.params[i].choices, p.choices) {
		return 0, fmt.Errorf("the placeholder {%s} has two different defaults", name)
	}
	return i, nil
}

// isParamName reports whether a placeholder may have the name.
func isParamName(name string) bool {
	for _, c := range []byte(name) {
		if class[c]&labelByte == 0 && c != '-' && c != '.' {
			return false
		}
	}
	return name != "" && name != "exporter_name"
}

// needs returns a parameter without a default, "" if all have one.
func (c *command) needs() string {
	for _, p := range c.params {
		if len(p.choices) == 0 {
			return p.name
		}
	}
	return ""
}

// values returns the values that the parameters take from a query, and whether
// they are the defaults. The error names the parameter, never the value.
func (c *command) values(query map[string][]string) (values []string, standard bool, err error) {
	standard = true
	for n, p := range c.params {
		given := query[p.name]
		switch {
		case len(given) > 1:
			return nil, false, fmt.Errorf("the parameter %s is there twice", p.name)
		case len(given) == 0 && len(p.choices) == 0:
			return nil, false, fmt.Errorf("the parameter %s is missing", p.name)
		case len(given) == 0:
			given = p.choices
		case p.listed && !slices.Contains(p.choices, given[0]):
			return nil, false, fmt.Errorf("the parameter %s has none of its values", p.name)
		case !slices.Contains(p.choices, given[0]):
			if fault := c.refuses(n, given[0]); fault != "" {
				return nil, false, fmt.Errorf("the parameter %s %s", p.name, fault)
			}
		}
		standard = standard && len(p.choices) > 0 && given[0] == p.choices[0]
		values = append(values, given[0])
	}
	return values, standard, nil
}

// refuses says why a value from outside may not become part of the command, ""
// if it may.
func (c *command) refuses(n int, value string) string {
	begins := func(word []piece) bool { // those before it may be empty
		own := slices.IndexFunc(word, func(p piece) bool { return p.param == n })
		fixed := slices.IndexFunc(word, func(p piece) bool { return p.param < 0 })
		return own >= 0 && (fixed < 0 || own < fixed)
	}
	switch {
	case len(value) > 1<<10:
		return "is longer than 1 KiB"
	case !utf8.ValidString(value):
		return "is not UTF-8"
	case strings.ContainsFunc(value, unicode.IsControl):
		return "holds a control character"
	case strings.HasPrefix(value, "-") && slices.ContainsFunc(c.words, begins):
		return "begins with -"
	}
	return ""
}

// args returns the words of the command with the values filled in.
func (c *command) args(values []string) []string {
	var args []string
	for _, word := range c.words {
		arg := ""
		for _, p := range word {
			if p.param >= 0 {
				arg += values[p.param]
			} else {
				arg += p.text
			}
		}
		args = append(args, arg)
	}
	return args
}

// run runs the command in a process group of its own until its first process
// ends or ctx is done. Then the whole group is killed, and what was written by
// then is read. It returns standard output, which has limit bytes at most.
func (c *command) run(ctx context.Context, values []string, timeout time.Duration, limit int64) ([]byte, *failure) {
	args := c.args(values)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "SCRAPE_TIMEOUT_SECONDS="+strconv.FormatFloat(timeout.Seconds(), 'f', -1, 64))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, errs, err := start(cmd)
	if err != nil {
		return nil, startFailure(args[0], err)
	}
	defer out.Close()
	defer errs.Close()

	ended, end := context.WithCancel(ctx)
	defer end()
	kill := func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	stop := context.AfterFunc(ended, kill)
	var body, tail []byte
	var readers sync.WaitGroup
	readers.Go(func() {
		body, _ = io.ReadAll(io.LimitReader(&patient{pipe: out}, limit+1))
		if int64(len(body)) > limit {
			end()
		}
	})
	readers.Go(func() { tail = readTail(errs) })
	err = cmd.Wait()
	stop()
	kill()
	// Whoever left the group may hold the pipes still.
	out.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	errs.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	readers.Wait()

	var f *failure
	if int64(len(body)) > limit {
		f = &failure{reason: "too_large", err: errTooLarge, detail: string(tail)}
	} else if err != nil {
		f = &failure{reason: "exit", err: fmt.Errorf("ended with %w", err), detail: string(tail)}
	}
	return body, f
}

// patient reads a pipe past its deadline, as much as a pipe can hold: so a late
// reader misses nothing of what was written in time.
type patient struct {
	pipe *os.File
	late int // bytes read past the deadline
}

func (r *patient) Read(p []byte) (n int, err error) {
	if n, err = r.pipe.Read(p); !errors.Is(err, os.ErrDeadlineExceeded) || r.late >= pipeSize {
		return n, err
	}
	raw, err := r.pipe.SyscallConn()
	if err != nil {
		return 0, err
	}
	r.pipe.SetReadDeadline(time.Time{}) // or it would not be read at all
	defer r.pipe.SetReadDeadline(time.Unix(1, 0))
	raw.Read(func(fd uintptr) bool {
		n, err = syscall.Read(int(fd), p[:min(len(p), pipeSize-r.late)])
		return true // whatever came of it: no waiting
	})
	if n <= 0 {
		return 0, io.EOF
	}
	r.late += n
	return n, nil
}

// pipeSize is how many bytes a pipe holds that nobody has read: 16 pages.
var pipeSize = 16 * os.Getpagesize()

// start starts a command with an empty standard input, for which no /dev/null is
// needed, and returns what it writes.
func start(cmd *exec.Cmd) (out, errs *os.File, err error) {
	var files []*os.File
	pipe := func() (r, w *os.File) {
		if err == nil {
			if r, w, err = os.Pipe(); err == nil {
				files = append(files, r, w)
			}
		}
		return r, w
	}
	in, none := pipe()
	out, outside := pipe()
	errs, errside := pipe()
	if err == nil {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = in, outside, errside
		none.Close()
		err = cmd.Start()
	}
	for _, f := range files {
		if err != nil || f != out && f != errs {
			f.Close()
		}
	}
	return out, errs, err
}

// startFailure says why a command did not start.
func startFailure(name string, err error) *failure {
	path, lookErr := exec.LookPath(name)
	switch {
	case errors.Is(err, syscall.ENOENT) && lookErr == nil:
		return fail("start", "failed to start %s: what its #! line names is missing, or its loader (an image from scratch has no shell)", path)
	case errors.Is(err, syscall.ENOEXEC):
		return fail("start", "failed to start %s: it has no #! line, or is made for another machine", path)
	case errors.Is(err, exec.ErrNotFound):
		return fail("start", "failed to start %s: there is no such program in PATH", name)
	}
	var withPath *os.PathError
	if errors.As(err, &withPath) {
		err = withPath.Err // without the whole path once more
	}
	return fail("start", "failed to start %s: %w", name, err)
}

// readTail reads to the end and returns the last 4 KiB.
func readTail(r io.Reader) []byte {
	const size = 4 << 10
	buf := make([]byte, 2*size)
	n := 0
	for {
		m, err := r.Read(buf[n:])
		if n += m; err != nil {
			return buf[max(0, n-size):n]
		}
		if n == len(buf) {
			n = copy(buf, buf[size:])
		}
	}
}

// ---- Counts

// status is what a source's fetches came to, for the metrics, the log and the
// page at /.
type status struct {
	mu sync.Mutex // guards all below
	counts

	told     string    // the state that the log knows: "", "up" or a reason
	toldTime time.Time // when it was told
}

// counts is a part of a status.
type counts struct {
	fetches     uint64
	failures    map[string]uint64 // by reason
	lastSuccess time.Time
	last        lastFetch
	fetched     bool // last is set
}

// lastFetch is what the last fetch with default arguments came to.
type lastFetch struct {
	duration time.Duration
	samples  int
	bytes    int64
	failure  *failure
}

// copy returns what was counted.
func (st *status) copy() counts {
	st.mu.Lock()
	defer st.mu.Unlock()
	c := st.counts
	c.failures = maps.Clone(c.failures)
	return c
}

// count counts a fetch. It returns what logs it: a change of the state, at most
// once a minute, for all to see.
func (p *program) count(s *source, standard bool, r *result) (tell func()) {
	state := "up"
	if r.failure != nil {
		state = r.failure.reason
	}
	st := &s.status
	st.mu.Lock()
	defer st.mu.Unlock()
	st.fetches++
	if r.failure != nil {
		st.fail(state)
	} else {
		st.lastSuccess = r.end
	}
	if standard {
		st.last = lastFetch{r.end.Sub(r.start), r.samples(), r.bytes, r.failure}
		st.fetched = true
	}
	changed := standard && st.told != state && (st.told == "" || time.Since(st.toldTime) >= time.Minute)
	if changed {
		st.told, st.toldTime = state, time.Now()
	}
	return func() { p.tell(s, r.failure, changed) }
}

// tell logs what a fetch came to.
func (p *program) tell(s *source, f *failure, changed bool) {
	level, what, attrs := slog.LevelDebug, "fetched", []any{"source", s.name}
	switch {
	case f == nil && changed:
		level, what = slog.LevelInfo, "source is up"
	case f != nil && changed:
		level, what = slog.LevelWarn, "source is down"
	case f != nil:
		what = "fetch failed"
	}
	if f != nil {
		attrs = append(attrs, "reason", f.reason, "err", f.err)
		if f.detail != "" {
			attrs = append(attrs, "stderr", f.detail)
		}
	}
	p.log.Log(context.Background(), level, what, attrs...)
}

// busy counts a scrape that found no place, or spent its time in line.
func (s *source) busy() {
	s.status.mu.Lock()
	defer s.status.mu.Unlock()
	s.status.fail("busy")
}

// fail counts a failure. The caller holds mu.
func (st *status) fail(reason string) {
	if st.failures == nil {
		st.failures = map[string]uint64{}
	}
	st.failures[reason]++
}
