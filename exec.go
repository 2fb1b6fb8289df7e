// This file turns a source into a result.
//
// A scrape asks a source through its waterfall, which gives it a share in a fetch. A fetch asks an exporter,
// reads files, or runs a command, and hands the bodies to the source's intake, which parses and labels them.

package main

import (
	"bytes"
	"cmp"
	"compress/flate"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path"
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

// sourceConfig is what the flags say of one source: plain data.
type sourceConfig struct {
	kind, name, target              string // as in --KIND NAME=TARGET
	timeout, maxAge                 time.Duration
	interval                        time.Duration // 0 to fetch on demand
	maxBytes                        int64
	parallel                        int      // runs of a command that may go on at once
	paths, params                   []string // params are URL parameters that are forwarded, * for all
	labels                          map[string]string
	drop                            []string // globs of metric families
	headers, headerFiles            []string // as KEY: VALUE, and files with lines of these
	tokenFile, caFile, serverName   string
	certFile, keyFile               string // keyFile is "" if the key stands in certFile
	insecure, raw, require, anyExit bool
}

// ownName is the exporter_name of the program itself.
const ownName = "reverse_exporter"

// source is one part of the appliance.
type source struct {
	fetcher
	waterfall // with the sourceConfig
	intake    intake
	line      commandLine // empty, and so without parameters, unless it is a command
}

// fetcher is what differs between the kinds of source.
type fetcher interface {
	String() string // where the source is, without secrets
	// arguments returns what a scraper chose of what it may choose. An error names a parameter, never a value.
	arguments(query url.Values, takes accept) (arguments, error)
	fetch(ctx context.Context, r *result, values []string) *failure // adds all there is now to the result
	check() error                                                   // finds what is wrong with files of the flags
}

// shared is what all sources share.
type shared struct {
	log        *slog.Logger
	userAgent  string
	workspaces sync.Pool  // of *workspace
	idle       sync.Map   // globs of --drop that have matched nothing yet
	starts     sync.Mutex // held while a command is started: one at a time
	watched    []*watched // the files that flags name
}

// newSource makes a source of flags that are good. All its fetches end with life.
func newSource(life context.Context, c *sourceConfig, sh *shared) *source {
	s := &source{intake: intake{sourceConfig: c, shared: sh, budget: budget{most: 4 * c.maxBytes}}}
	s.waterfall = waterfall{sourceConfig: c, life: life, places: 16, budget: &s.intake.budget, keys: map[string]*key{}}
	s.status.failures = map[string]uint64{}
	added := &s.intake.added
	added.drop, added.idle = c.drop, &sh.idle
	for _, glob := range c.drop {
		sh.idle.Store(glob, true)
	}
	if !c.raw {
		added.add("exporter_name", c.name)
		added.telling = c.kind != "file" || !hasMeta(c.target) // two files may have the same series
	}
	for _, key := range slices.Sorted(maps.Keys(c.labels)) {
		added.add(key, c.labels[key])
	}
	switch c.kind {
	case "http":
		s.places = 128
		s.fetcher = newExporter(&s.intake)
	case "file":
		s.fetcher = &files{intake: &s.intake, hangs: map[string]bool{}}
	case "exec":
		line, _ := parseCommand(c.target)
		s.line = *line
		s.fetcher = &command{&s.intake, s.line}
	}
	s.do = s.fetcher.fetch
	log, twice := sh.log.With("exporter_name", c.name), new(sync.Once)
	s.report = func(r *result, changes int) { logFetch(log, twice, r, changes) }
	return s
}

// takes reports whether a scraper chooses a value of the URL parameter.
func (s *source) takes(name string) bool {
	return slices.Contains(s.params, "*") || slices.Contains(s.params, name) ||
		slices.ContainsFunc(s.line.params, func(p param) bool { return p.name == name })
}

// result is what one fetch yields. It does not change once a scrape can see it.
type result struct {
	bodies     []*exposition // in order; empty if all of it failed
	failure    *failure      // nil if the source is up
	bytes      int64         // of body, decompressed
	held       int64         // bytes that the bodies take in memory
	files      []fileTime
	exit       *int   // status of a command that ended by itself
	stderr     string // the end of a command's, for the log only
	start, end time.Time
	told       time.Duration // how long the source had
	fresh      time.Time     // until then the bodies are served to scrapes that come later
	budget     *budget       // that it draws on; nil with default arguments
	drawn      int64         // bytes, see budget
}

// samples counts the samples of all bodies.
func (r *result) samples() int { return r.sum(func(e *exposition) int { return e.samples }) }

// sum adds up what each body has.
func (r *result) sum(of func(e *exposition) int) int {
	n := 0
	for _, e := range r.bodies {
		n += of(e)
	}
	return n
}

// openMetrics reports whether one of the bodies is OpenMetrics.
func (r *result) openMetrics() bool {
	return slices.ContainsFunc(r.bodies, func(e *exposition) bool { return e.openMetrics })
}

// quoted reports whether a name in one of the bodies needs quotes.
func (r *result) quoted() bool {
	return slices.ContainsFunc(r.bodies, func(e *exposition) bool { return e.quoted })
}

// seconds formats a duration in seconds.
func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) }

// fileTime is when a file that was read had last been modified.
type fileTime struct {
	name  string
	mtime time.Time
}

// failure is why a fetch failed.
type failure struct {
	reason string // as in reverse_exporter_source_failures_total
	err    error
	hint   string // what to do about it, with NAME for the source until the fetch has finished
	detail string // for the log only
}

// fail returns a failure of the reason.
func fail(reason, format string, args ...any) *failure {
	return &failure{reason: reason, err: fmt.Errorf(format, args...), hint: hints[reason]}
}

// advise gives the failure a hint that knows more than its reason, unless it is empty.
func (f *failure) advise(hint string) *failure {
	f.hint = cmp.Or(hint, f.hint)
	return f
}

// String returns the error and what to do about it.
func (f *failure) String() string { return strings.TrimSuffix(f.err.Error()+"; "+f.hint, "; ") }

// hints say what to do about a failure of which no more is known than the reason.
var hints = map[string]string{
	"connect":      "is it running? Is the address right? (in a container, localhost is the container)",
	"tls":          "is the certificate valid today, for this host name, and by a CA that --ca-file NAME:FILE names?",
	"status":       "its own log may say why",
	"content_type": "is the path right? Most exporters have their metrics at /metrics",
	"encoding":     "a proxy between the two may compress, or say that it does",
	"read":         "it closed the connection too early: its own log may say why",
	"too_large":    "has one of its labels got too many values? If so much is right: --max-bytes NAME:SIZE",
	"timeout":      "is it overloaded? If it needs longer: --timeout NAME:DURATION, and a longer scrape_timeout",
	"parse":        "promtool check metrics says more about what it delivers",
	"exit":         "the log has what it wrote to standard error; if its status is no failure: --any-exit NAME",
	"start":        "is it installed here, and may this user run it?",
	"file":         "does the job that writes it still run, and may this user read it?",
	"internal":     "please report it, with what the log says",
}

// ---- The waterfall

// waterfall lets many scrapes share few fetches. One fetch of a key runs at a time, and one may wait.
// Of a command, as many run at once as --parallel says; of files one, of an exporter all.
type waterfall struct {
	*sourceConfig
	do     func(ctx context.Context, r *result, values []string) *failure // fetches
	report func(r *result, changes int)                                   // logs a fetch that counts, without mu
	budget *budget                                                        // of results with chosen arguments
	life   context.Context                                                // ends all fetches
	places int                                                            // for keys, see makeRoom

	mu      sync.Mutex // guards all below, with the keys, fetches and tickets
	status  status
	keys    map[string]*key
	waiting []*fetch // in order of arrival, but those of default arguments first
	running int      // fetches, even if they are cancelled, until they have really ended
	runs    sync.WaitGroup
}

// arguments are what a scraper chose of what a source lets it choose.
type arguments struct {
	id       string // tells them from all others
	values   []string
	standard bool // they are the defaults
}

// key is one choice of arguments, with who asked for it and the result kept for it.
type key struct {
	arguments
	running *fetch           // nil if there is none
	newest  *result          // nil before the first and once nobody needs it
	tickets map[*ticket]bool // handed out and not handed back
	expiry  *time.Timer      // drops newest, or its bodies, once they are older than --max-age
}

// fetch is one run, from the moment it is queued. It does not hold its result, as newer ones replace that.
type fetch struct {
	key       *key
	started   time.Time     // zero while it waits
	told      time.Duration // how long the source has
	cancel    context.CancelFunc
	overdue   *time.Timer
	ended     bool // its outcome is known
	cancelled bool // nobody waits for it any more
	expired   bool // it is cancelled because the deadline of its last waiter passed
}

// ticket is one scrape's share in a key.
type ticket struct {
	*waterfall
	key         *key      // nil if it has no share
	came, until time.Time // from when until when it waits
	fetch       *fetch    // the one to wait for, nil if there is none
	got         *result   // the newest for it, nil if there is none yet
	wake        sync.Cond // waits for got, or for the context of wait to be done
}

// Results of scrapes that get none.
var (
	late = &result{
		failure: fail("timeout", "no result by the deadline of the scrape").advise("raise scrape_timeout"),
	}
	queued  = &result{failure: fail("busy", "still waiting for its turn at the deadline of the scrape")}
	hurried = &result{failure: fail("busy", "less than %v to the deadline of the scrape", leastTime)}
	refused = &result{failure: fail("busy", "too many different arguments at once")}
)

const (
	leastTime    = 50 * time.Millisecond // what must be left to a scrape for a fetch to start
	overdueAfter = time.Second           // how long a fetch may take to end once its context is done
)

// join hands out a ticket for a key, with a kept result or a share in a fetch. until is when the scrape stops
// waiting: never, and for a new result, if it is the zero time, which fetches in the background pass.
func (w *waterfall) join(a arguments, until time.Time) *ticket {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := &ticket{waterfall: w, key: w.keys[a.id], came: time.Now(), until: until}
	t.wake.L = &w.mu
	if until.IsZero() {
		t.until = t.came.Add(math.MaxInt64)
	}
	switch {
	case !until.IsZero() && t.key != nil && w.keeps(t.key.newest):
		t.got = t.key.newest
		t.key.tickets[t] = true
	case t.until.Sub(t.came) < leastTime:
		t.key, t.got = nil, hurried
	case t.key == nil && !a.standard && !w.makeRoom():
		t.got = refused
	default:
		if t.key == nil {
			t.key = &key{arguments: a, tickets: map[*ticket]bool{}}
			w.keys[a.id] = t.key
		}
		t.key.tickets[t] = true
		w.enter(t)
	}
	return t
}

// makeRoom reports whether there is a place for another key of chosen arguments. A key that runs
// takes no place, unless the source is an exporter. Results that are only kept make room, the oldest first.
func (w *waterfall) makeRoom() bool {
	for {
		places, oldest := w.places, (*key)(nil)
		for _, k := range w.keys {
			if k.standard || w.kind != "http" && k.running != nil {
				continue
			}
			places--
			if len(k.tickets) == 0 && k.running == nil && (oldest == nil || k.newest.end.Before(oldest.newest.end)) {
				oldest = k
			}
		}
		fits := places > 0 && w.budget.left() >= w.budget.likely()
		if fits || oldest == nil {
			return fits
		}
		oldest.replace(nil)
		w.tidy(oldest)
	}
}

// enter makes a ticket wait for a fetch of its key: the running one if that was told enough time, or the next one.
func (w *waterfall) enter(t *ticket) {
	i := slices.IndexFunc(w.waiting, func(f *fetch) bool { return f.key == t.key })
	switch f := t.key.running; {
	case f != nil && !f.ended && !f.cancelled && t.enough(f.told, f.started):
		t.fetch = f
	case i >= 0:
		t.fetch = w.waiting[i]
	case t.key.standard:
		t.fetch = &fetch{key: t.key}
		w.waiting = slices.Insert(w.waiting, 0, t.fetch)
	default:
		t.fetch = &fetch{key: t.key}
		w.waiting = append(w.waiting, t.fetch)
	}
	w.advance()
}

// enough reports whether a run was told at least half of what it would be for this scrape: with less, probes fail.
func (t *ticket) enough(told time.Duration, start time.Time) bool {
	if start.Before(t.came) {
		start = t.came
	}
	return 2*told >= t.tells(start, t.until)
}

// tells returns how long a source is told that it has: a little less than it has, so that the answer is in time.
func (w *waterfall) tells(start, until time.Time) time.Duration {
	if w.interval > 0 || w.maxAge > 0 {
		return w.timeout
	}
	d := min(w.timeout, until.Sub(start))
	return d - margin(d)
}

// margin is how much earlier than a deadline an answer should be under way.
func margin(d time.Duration) time.Duration { return min(d/10, 500*time.Millisecond) }

// wait waits until there is a result or ctx is done.
func (t *ticket) wait(ctx context.Context) {
	t.mu.Lock()
	defer t.mu.Unlock()
	defer context.AfterFunc(ctx, func() {
		t.mu.Lock() // without it, the signal could come between the check of ctx and the wait
		defer t.mu.Unlock()
		t.wake.Signal()
	})()
	for t.got == nil && ctx.Err() == nil {
		t.wake.Wait()
	}
}

// result returns the newest result that ended after the ticket was handed out, or was kept then.
func (t *ticket) result() *result {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.got == nil && t.fetch.started.IsZero() {
		return queued
	}
	return cmp.Or(t.got, late)
}

// leave hands the ticket back. A fetch that nobody waits for leaves the line or, if it runs, is cancelled unless
// --max-age will keep its result. If the scrape's deadline passed (expired), that is a timeout after a second, or
// busy in the line.
func (t *ticket) leave(expired bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.fetch
	if t.got == refused || expired && t.got == nil && f.started.IsZero() {
		t.status.failures["busy"]++
	}
	if t.key == nil {
		return
	}
	delete(t.key.tickets, t)
	switch {
	case f == nil || f.ended || !f.lastDeadline().IsZero(): // it is over, or others wait for it
	case f.started.IsZero():
		t.waiting = slices.DeleteFunc(t.waiting, func(other *fetch) bool { return other == f })
	case t.maxAge == 0:
		f.cancelled, f.expired = true, expired && time.Since(f.started) >= time.Second
		f.cancel()
	}
	t.tidy(t.key)
}

// advance starts the fetches that there is room for: never two of one key, even if one is cancelled.
func (w *waterfall) advance() {
	for (w.kind == "http" || w.running < max(w.parallel, 1)) && w.life.Err() == nil {
		i := slices.IndexFunc(w.waiting, func(f *fetch) bool {
			return f.key.running == nil && time.Until(f.lastDeadline()) >= leastTime
		})
		if i < 0 {
			return
		}
		f := w.waiting[i]
		w.waiting = slices.Delete(w.waiting, i, i+1)
		w.running++
		f.key.running, f.started = f, time.Now()
		f.told = w.tells(f.started, f.lastDeadline())
		ctx, cancel := context.WithTimeout(w.life, w.timeout)
		f.cancel = cancel
		f.overdue = time.AfterFunc(w.timeout+overdueAfter, func() { // it cannot be ended, on a dead disk say
			w.finish(f, &result{failure: w.timedOut(), start: f.started, end: time.Now(), told: f.told})
		})
		w.runs.Go(func() { w.run(ctx, f) })
	}
}

// lastDeadline returns when the last scrape that waits for the fetch stops waiting, the zero time if none waits.
func (f *fetch) lastDeadline() (last time.Time) {
	for t := range f.key.tickets {
		if t.fetch == f && t.until.After(last) {
			last = t.until
		}
	}
	return last
}

// run runs a fetch to its end, and makes room for the next one.
func (w *waterfall) run(ctx context.Context, f *fetch) {
	r := w.guard(ctx, f)
	w.finish(f, r)
	w.mu.Lock()
	defer w.mu.Unlock()
	f.cancel()
	if f.key.newest != r {
		r.budget.draw(r, 0)
	}
	w.running--
	f.key.running = nil
	w.advance()
	w.tidy(f.key)
}

// guard fetches, with what all fetches have in common: times, the deadline, the budget.
func (w *waterfall) guard(ctx context.Context, f *fetch) *result {
	r := &result{start: f.started, told: f.told}
	if !f.key.standard {
		r.budget = w.budget
		r.budget.draw(r, w.budget.likely())
	}
	r.failure = recovered(r, func() *failure { return w.do(ctx, r, f.key.values) })
	r.end = time.Now()
	r.budget.draw(r, r.held)
	// At the limit, a process fails to start with EBADF: its files cannot be given numbers above the limit.
	if why := r.failure; why != nil && (errors.Is(why.err, syscall.EMFILE) || errors.Is(why.err, syscall.EBADF)) {
		why.err = fmt.Errorf("%w: raise the limit of open files (ulimit -n)", why.err)
	}
	if r.failure != nil && r.failure.reason != "internal" && ctx.Err() == context.DeadlineExceeded {
		r.failure = w.timedOut()
	}
	return r
}

// recovered calls do, and makes a panic a failure of the source.
func recovered(r *result, do func() *failure) (f *failure) {
	defer func() {
		if v := recover(); v != nil {
			r.bodies = nil
			f = fail("internal", "a fault in reverse_exporter: %v", v)
			f.detail = string(debug.Stack())
		}
	}()
	return do()
}

// timedOut returns the failure of a fetch that took longer than --timeout.
func (w *waterfall) timedOut() *failure {
	f := fail("timeout", "not done within %v", w.timeout)
	if w.kind == "exec" {
		f.advise("it must print its metrics and end: is it a service? If it needs longer: --timeout NAME:DURATION")
	}
	return f
}

// finish makes the outcome of a fetch known, once. It counts unless its scrapers left or life ends.
func (w *waterfall) finish(f *fetch, r *result) {
	w.mu.Lock()
	f.overdue.Stop()
	if f.ended {
		w.mu.Unlock()
		return
	}
	f.ended = true
	if r.failure != nil {
		r.failure.hint = strings.ReplaceAll(r.failure.hint, "NAME", w.name)
	}
	if f.expired {
		r.bodies, r.failure = nil, late.failure
	}
	counts := (!f.cancelled || f.expired) && w.life.Err() == nil
	changes := 0
	if counts { // before anybody gets the result, so that it is counted on its own page
		changes = w.status.count(f.key.standard, r)
	}
	if !f.cancelled {
		w.keep(f.key, r)
		for t := range f.key.tickets { // whatever they waited for, it is the newest
			switch {
			case w.keeps(r), !r.end.Before(t.came) && t.enough(r.told, r.start):
				t.got = r
				t.wake.Signal()
			case t.fetch == f: // it came between the end of the run and this moment
				w.enter(t)
			}
		}
		w.tidy(f.key)
	}
	w.mu.Unlock()
	if counts {
		w.report(r, changes)
	}
}

// repeat fetches a source at its interval; a fetch that takes longer skips beats.
func (s *source) repeat(ctx context.Context) {
	begin, retry := time.Now(), time.Duration(0)
	standard, _ := s.arguments(nil, prometheus3)
	for {
		t := s.join(standard, time.Time{})
		t.wait(ctx)
		r := t.result()
		t.leave(false)
		pause := s.interval - time.Since(begin)%s.interval
		if r.failure == nil {
			retry = 0
		} else {
			retry = min(max(2*retry, 5*time.Second), s.interval) // it may be over soon
			pause = retry
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// drain waits until all fetches have ended. Its caller has ended life.
func (w *waterfall) drain() {
	w.mu.Lock() // whoever still holds it may be adding a fetch to runs
	w.mu.Unlock()
	w.runs.Wait()
}

// keep makes a result the newest of its key. One that failed in the background gets the last good bodies.
func (w *waterfall) keep(k *key, r *result) {
	if old := k.newest; r.failure == nil {
		r.fresh = r.end.Add(w.maxAge)
	} else if w.interval > 0 && len(r.bodies) == 0 && old != nil && time.Now().Before(old.fresh) {
		r.bodies, r.fresh = old.bodies, old.fresh
	}
	k.replace(r)
	if left := time.Until(r.fresh); left > 0 {
		k.expiry = time.AfterFunc(left, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.tidy(k)
		})
	}
}

// replace makes a result the newest of the key, nil to have none.
func (k *key) replace(r *result) {
	if k.expiry != nil {
		k.expiry.Stop() // or it would hold the key
	}
	if k.newest != nil {
		k.newest.budget.draw(k.newest, 0)
	}
	k.newest = r
}

// tidy drops what nobody needs any more: the key, its result, or the good bodies that a failed result was given
// (see keep) once they are older than --max-age.
func (w *waterfall) tidy(k *key) {
	r := k.newest
	if len(k.tickets) == 0 && !w.keeps(r) {
		k.replace(nil)
	} else if r != nil && r.failure != nil && !r.fresh.IsZero() && !time.Now().Before(r.fresh) {
		alone := *r // a page may have the other
		alone.bodies, alone.fresh = nil, time.Time{}
		k.newest = &alone
	}
	if k.newest == nil && len(k.tickets) == 0 && k.running == nil && w.keys[k.id] == k {
		delete(w.keys, k.id)
	}
}

// keeps reports whether a result, of the background or within --max-age, is served to later scrapes.
func (w *waterfall) keeps(r *result) bool {
	return r != nil && (w.interval > 0 || time.Now().Before(r.fresh))
}

// ---- Taking turns

// turn is what only one can have at a time, and takes CPU. It goes to the client that has had it for the
// shortest time within the last minute, so that who asks for much does not hold up the others.
type turn struct {
	most int // of one client that may wait for a password; 0, any number, for a page

	mu      sync.Mutex // guards all below
	taken   bool
	holder  string                      // the client that has it
	since   time.Time                   // from when it has it
	waiting []*waiter                   // in order of arrival
	spent   [2]map[string]time.Duration // by client: since minute, and in the minute before
	minute  time.Time
}

// waiter is one who waits for a turn.
type waiter struct {
	client string        // see clientOf
	come   chan struct{} // closed when its turn has come
}

// errTooManyWait is the failure of a wait because too many of the client wait already.
var errTooManyWait = errors.New("too many of this client wait already")

// wait waits for the turn. It fails if ctx ends first, or if too many of the client wait already.
func (t *turn) wait(ctx context.Context, client string) error {
	own := &waiter{client: client, come: make(chan struct{})}
	t.mu.Lock()
	n := 0 // of the client
	for _, other := range t.waiting {
		if other.client == client {
			n++
		}
	}
	if t.most > 0 && n >= t.most {
		t.mu.Unlock()
		return errTooManyWait
	}
	t.waiting = append(t.waiting, own)
	if !t.taken {
		t.next()
	}
	t.mu.Unlock()
	select {
	case <-own.come:
		return nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if i := slices.Index(t.waiting, own); i >= 0 {
		t.waiting = slices.Delete(t.waiting, i, i+1)
	} else { // its turn came at the same moment
		t.next()
	}
	return ctx.Err()
}

// length returns how many wait.
func (t *turn) length() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.waiting)
}

// pass charges the turn to the client that had it, and hands it to the one who is next.
func (t *turn) pass() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now := time.Now(); now.Sub(t.minute) >= time.Minute {
		t.spent = [2]map[string]time.Duration{{}, t.spent[0]}
		if now.Sub(t.minute) >= 2*time.Minute {
			t.spent[1] = nil
		}
		t.minute = now
	}
	t.spent[0][t.holder] += time.Since(t.since)
	t.next()
}

// next gives the turn to a waiter of the client that has had least, and among equals to one of the client with the
// fewest waiters, which puts those that flood last. The caller holds mu.
func (t *turn) next() {
	if t.taken = len(t.waiting) > 0; !t.taken {
		return
	}
	cost := func(w *waiter) time.Duration { return t.spent[0][w.client] + t.spent[1][w.client] }
	wait := map[string]int{} // of each client
	for _, w := range t.waiting {
		wait[w.client]++
	}
	first := slices.MinFunc(t.waiting, func(a, b *waiter) int {
		return cmp.Or(cmp.Compare(cost(a), cost(b)), cmp.Compare(wait[a.client], wait[b.client]))
	})
	t.holder, t.since = first.client, time.Now()
	t.waiting = slices.DeleteFunc(t.waiting, func(other *waiter) bool { return other == first })
	close(first.come)
}

// ---- Files that flags name

// tlsFiles are what the files hold that flags for TLS name, on either side of a connection.
type tlsFiles struct {
	cert atomic.Pointer[tls.Certificate] // that the other side is shown, nil for none
	cas  atomic.Pointer[x509.CertPool]   // that the other side's is verified against, nil for the system's
}

// setCert keeps a certificate, and its key, which may be in the same file.
func (t *tlsFiles) setCert(files []flagFile) error {
	cert, err := tls.X509KeyPair(files[0].text, files[1].text)
	switch {
	case bytes.Contains(files[1].text, []byte("ENCRYPTED")):
		return files[1].fault(errors.New("the key is encrypted: decrypt it with openssl pkey -in FILE"))
	case err != nil && strings.Contains(err.Error(), "key"):
		return files[1].fault(err)
	case err != nil:
		return files[0].fault(err)
	}
	t.cert.Store(&cert)
	return nil
}

// setCAs keeps the certificates of CAs.
func (t *tlsFiles) setCAs(files []flagFile) error {
	cas := x509.NewCertPool()
	if !cas.AppendCertsFromPEM(files[0].text) {
		return files[0].fault(errors.New("it holds no certificate in PEM format"))
	}
	t.cas.Store(cas)
	return nil
}

// checkExpiry says that the certificate has expired.
func (t *tlsFiles) checkExpiry() error {
	if cert := t.cert.Load(); cert != nil && time.Now().After(cert.Leaf.NotAfter) {
		return fmt.Errorf("the certificate expired on %s", cert.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// flagFile is a file that a flag names.
type flagFile struct {
	flag, name string
	text       []byte // once it is read
}

// fault says where a fault in the text is.
func (f flagFile) fault(err error) error { return fmt.Errorf("%s: %s: %w", f.flag, f.name, err) }

// watched are files that are reread when they change. A broken one leaves in use what was before.
type watched struct {
	files   []flagFile
	set     func(files []flagFile) error // keeps what they hold
	changed func()                       // called after each time that set has kept something
	log     *slog.Logger

	looking atomic.Bool // a goroutine reads the files, which guards kept and fault
	kept    []flagFile  // what set has kept last, nil before the first time
	fault   string      // why what was last read could not be used, "" if it could
	broken  atomic.Bool // there is a fault
}

// watch adds files that are reread, if the flag is given.
func (sh *shared) watch(set func(files []flagFile) error, changed func(), files ...flagFile) {
	if len(files) > 0 && files[0].name != "" {
		sh.watched = append(sh.watched, &watched{files: files, set: set, changed: changed, log: sh.log})
	}
}

// refresh rereads the files, and with again tells once more what is wrong. If the disk still keeps an
// earlier call waiting, it returns at once.
func (w *watched) refresh(again bool) {
	if !w.looking.CompareAndSwap(false, true) {
		return
	}
	defer w.looking.Store(false)
	switch err := w.load(); {
	case err == nil:
		w.fault = ""
	case again || err.Error() != w.fault:
		w.fault = err.Error()
		w.log.Error("failed to reload a changed file: what it held before stays in use", "err", err)
	}
	w.broken.Store(w.fault != "")
}

// load hands the files to set if one has changed. Its error has a line for each that cannot be read.
func (w *watched) load() error {
	files := slices.Clone(w.files)
	var faults []error
	for i, f := range w.files {
		var err error
		if files[i].text, err = f.read(); err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", f.flag, err))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	same := func(a, b flagFile) bool { return bytes.Equal(a.text, b.text) }
	if w.fault == "" && slices.EqualFunc(files, w.kept, same) {
		return nil
	}
	if err := w.set(files); err != nil {
		return err
	}
	w.changed()
	if w.kept != nil {
		w.log.Info("reloaded a changed file", "flag", w.files[0].flag)
	}
	w.kept = files
	return nil
}

// read reads the file, without a byte order mark.
func (f flagFile) read() ([]byte, error) {
	file, _, err := openRegular(f.name, "")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	const most = 1 << 20
	text, err := io.ReadAll(io.LimitReader(file, most+1))
	if err != nil || len(text) > most {
		return nil, fmt.Errorf("%s cannot be read, or is larger than 1 MiB", f.name)
	}
	return bytes.TrimPrefix(text, []byte(byteOrderMark)), nil
}

// eachLine calls do for each trimmed line, without comments and empty ones, until one fails.
func eachLine(text []byte, do func(line string) error) error {
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		if err := do(line); err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
	return nil
}

// ---- Reading a body

// intake takes the bodies of one source: it parses and labels them, within bounds.
type intake struct {
	*sourceConfig
	*shared
	budget budget // of results with arguments that scrapers chose
	added  addedLabels
}

// read reads one more body into a result.
func (in *intake) read(r *result, b *body, f format) *failure {
	b.limit = in.maxBytes - r.bytes
	w, ok := in.workspaces.Get().(*workspace)
	if !ok {
		w = &workspace{}
	}
	w.likely = int(cmp.Or(in.budget.last.Load(), min(b.size, in.maxBytes)*3/2))
	room := min(4*in.maxBytes, math.MaxUint32, math.MaxInt) - r.held // in memory
	if r.budget != nil {
		room = min(room, r.drawn)
		w.more = func(wanted, limit int) int {
			if r.budget.draw(r, int64(wanted)+r.budget.most/256) { // some more, for what comes next
				limit = int(r.drawn)
			}
			return limit
		}
	}
	src := io.Reader(b)
	if !f.protobuf {
		start := make([]byte, len(byteOrderMark))
		n, _ := io.ReadFull(b, start) // an error comes again with the next read
		src = io.MultiReader(bytes.NewReader(bytes.TrimPrefix(start[:n], []byte(byteOrderMark))), b)
	}
	e, err := labelBody(src, f, &in.added, w, int(room))
	w.more = nil // it holds the result
	in.workspaces.Put(w)
	r.bytes += b.n
	switch {
	case err == nil:
		r.bodies = append(r.bodies, e)
		r.held += int64(e.held())
		in.budget.last.Store(int64(len(e.buf) + len(e.buf)/16 + 2<<10)) // readLines wants 1 KiB free to the end
		return nil
	case errors.Is(err, errTooMuch) && r.budget != nil && r.budget.left()+r.drawn < r.budget.most:
		return fail("busy", "results with other arguments take all the memory that there is for them")
	}
	return in.readFailure(err, max(r.bytes, b.size))
}

// budget bounds the memory of the results of a source that are in flight or kept. Nil has no bound.
type budget struct {
	most  int64
	last  atomic.Int64 // size of the last body with its labels, and some more: the next is likely to fit in
	mu    sync.Mutex   // for one draw at a time
	spent atomic.Int64
}

// likely returns how many bytes the next result is likely to take, but no more than there can be.
func (b *budget) likely() int64 { return min(max(b.last.Load(), b.most/256), b.most) }

// draw makes bytes what a result takes of the budget, and changes nothing if there is less.
func (b *budget) draw(r *result, bytes int64) bool {
	if b == nil {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if bytes-r.drawn > b.left() {
		return false
	}
	b.spent.Add(bytes - r.drawn)
	r.drawn = bytes
	return true
}

// left returns how many bytes no result has drawn.
func (b *budget) left() int64 { return b.most - b.spent.Load() }

// body reads what a source delivers, up to its limit or until its context is done.
type body struct {
	ctx        context.Context
	src        io.Reader
	size       int64 // that it says it has, 0 if it does not
	n, limit   int64
	untilClose bool // only its last newline shows that it was not cut short
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
	if b.untilClose && err == io.EOF && b.n > 0 && b.last != '\n' && b.last != 0 { // as in files.read
		err = errNoNewline
	}
	return n, err
}

// errNoNewline is the failure of a body that may have been cut short.
var errNoNewline = errors.New("its last newline is missing, and only the end of the connection ends it")

// byteOrderMark is what Windows programs put at the beginning of UTF-8 text.
const byteOrderMark = "\ufeff"

// readFailure says why a body, of size bytes as far as is known, could not be taken.
func (c *sourceConfig) readFailure(err error, size int64) *failure {
	switch {
	case errors.Is(err, errTooLarge), errors.Is(err, errTooMuch):
		return fail("too_large", "%w (%.4g MiB; the body has %.4g MiB or more)", err,
			float64(c.maxBytes)/(1<<20), float64(size)/(1<<20))
	case errors.As(err, new(*syntaxError)):
		return fail("parse", "%w", err)
	case errors.Is(err, gzip.ErrChecksum), errors.Is(err, gzip.ErrHeader),
		errors.As(err, new(flate.CorruptInputError)):
		return fail("encoding", "the body is not whole gzip, as its header says: %w", err)
	}
	return fail("read", "failed to read the body to its end: %w", withoutURL(err))
}

// endsOpenMetrics reports whether the last line that is not blank is # EOF: then timestamps are in seconds.
func endsOpenMetrics(body []byte) bool {
	line := bytes.TrimPrefix(bytes.TrimRight(body, " \t\r\n"), []byte(byteOrderMark))
	return bytes.HasSuffix(line, []byte("# EOF")) && (len(line) == 5 || line[len(line)-6] == '\n')
}

// ---- Exporters

// exporter fetches from an http source.
type exporter struct {
	*intake
	url    *url.URL
	socket string // path of the Unix socket that it is at, "" for TCP

	mu        sync.Mutex                     // makes one transport at a time
	transport atomic.Pointer[http.Transport] // see reconnect
	lookup    func(ctx context.Context, version, host string) ([]netip.Addr, error)
	fixed     http.Header // from the command line
	headers   atomic.Pointer[http.Header]
	token     atomic.Pointer[string] // nil without a token file
	tls       tlsFiles
}

// accept is what a scraper takes beside the text format.
type accept struct {
	format          // that it takes at least as gladly as any other
	escaping string // one of escapings, or "" if it names none
}

// escapings are what a scraper can have done to names that need quotes.
var escapings = []string{"allow-utf-8", "underscores", "dots", "values"}

// prometheus3 is what Prometheus takes since 3.0, unless it is told otherwise.
var prometheus3 = accept{format{openMetrics: true}, "allow-utf-8"}

// prometheusNative is what it takes with scrape_native_histograms.
var prometheusNative = accept{format{protobuf: true}, prometheus3.escaping}

// header returns the Accept header that Prometheus would send, 3.16 with an escaping and 2.53
// without: exporters are tested with these, and some answer 406 to others.
func (a accept) header() string {
	const openMetrics, text = "application/openmetrics-text;version=", "text/plain;version="
	quoted, weight := "", 5
	if a.escaping != "" {
		quoted, weight = ";escaping="+a.escaping, 6
	}
	var list []string
	if a.protobuf {
		list, weight = append(list, protobufMetrics), weight+1
	}
	if a.openMetrics || a.protobuf {
		list = append(list, openMetrics+"1.0.0"+quoted, openMetrics+"0.0.1")
	}
	if a.escaping != "" {
		list = append(list, text+"1.0.0"+quoted)
	}
	list = append(list, text+"0.0.4", "*/*")
	for i := range list {
		list[i] += ";q=0." + strconv.Itoa(weight-i)
	}
	return strings.Join(list, ",")
}

// protobufMetrics is the media type of metrics in protobuf.
const protobufMetrics = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"

// timeoutHeader tells how long a scraper waits, in seconds.
const timeoutHeader = "X-Prometheus-Scrape-Timeout-Seconds"

// newExporter makes an exporter of flags that are good.
func newExporter(in *intake) *exporter {
	e, c := &exporter{intake: in, lookup: net.DefaultResolver.LookupNetIP, fixed: http.Header{}}, in.sourceConfig
	e.url, e.socket, _ = parseURL(c.target)
	if user := e.url.User; user != nil { // as a header, so that redirects keep it and no error tells it
		password, _ := user.Password()
		(&http.Request{Header: e.fixed}).SetBasicAuth(user.Username(), password)
		e.url.User = nil
	}
	for _, line := range c.headers {
		key, value, _ := parseHeader(line)
		e.fixed.Add(key, value)
	}
	e.headers.Store(&e.fixed)
	watch := func(flag string, set func(files []flagFile) error, names ...string) {
		var files []flagFile
		for _, name := range names {
			files = append(files, flagFile{flag: "--" + flag + " " + c.name, name: name})
		}
		e.watch(set, e.reconnect, files...)
	}
	watch("header", e.setHeaders, c.headerFiles...)
	watch("bearer-token-file", e.setToken, c.tokenFile)
	watch("ca-file", e.tls.setCAs, c.caFile)
	watch("cert-file", e.tls.setCert, c.certFile, cmp.Or(c.keyFile, c.certFile))
	e.reconnect()
	return e
}

// reconnect closes connections, those in use after their answer: the next fetch looks up and verifies anew.
func (e *exporter) reconnect() {
	e.mu.Lock() // or a transport could take the place of a newer one
	config := &tls.Config{RootCAs: e.tls.cas.Load(), ServerName: e.serverName, InsecureSkipVerify: e.insecure}
	if cert := e.tls.cert.Load(); cert != nil { // even if the exporter names other CAs
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	old := e.transport.Swap(&http.Transport{ // without a proxy from the environment
		DialContext:            e.dial,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    e.timeout + overdueAfter, // the deadline of the fetch says more
		DisableCompression:     true,                     // it would hide that the body was compressed
		MaxResponseHeaderBytes: 64 << 10,
		IdleConnTimeout:        5 * time.Minute,
		DisableKeepAlives:      maxConnections() < 24, // idle ones would take the last file descriptors
	})
	e.mu.Unlock()
	if old != nil {
		old.CloseIdleConnections()
	}
}

// maxConnections is 1,024, or half of the files that may be open beyond those that program and command need.
func maxConnections() int {
	files := syscall.Rlimit{Cur: 1 << 20} // if the system tells none
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files)
	return int(max(2, min(1024, int64(min(files.Cur, 1<<20))/2-8)))
}

// String returns the URL without its user, password and query.
func (e *exporter) String() string {
	if e.socket != "" {
		return "http://unix:" + e.socket + ":" + e.url.Path
	}
	return e.url.Scheme + "://" + e.url.Host + e.url.Path
}

// check finds a client certificate that has expired: other faults show when the files are read.
func (e *exporter) check() error { return e.tls.checkExpiry() }

// arguments returns the URL parameters that --params forwards, unless the URL has them itself, and how
// to ask. A result that others get, too, is asked for in the form that loses least and that each can be given.
func (e *exporter) arguments(query url.Values, takes accept) (arguments, error) {
	if e.interval > 0 || e.maxAge > 0 {
		takes = prometheus3
	}
	forwarded := url.Values{}
	all, own := slices.Contains(e.params, "*"), e.url.Query()
	for name, given := range query {
		if name != "exporter_name" && !own.Has(name) && (all || slices.Contains(e.params, name)) {
			forwarded[name] = given
		}
	}
	values := []string{forwarded.Encode(), takes.header()}
	standard := values[0] == "" && (takes == prometheus3 || takes == prometheusNative || takes.escaping == "")
	return arguments{strings.Join(values, " "), values, standard}, nil
}

// fetch scrapes the exporter, with the query and the Accept header in values.
func (e *exporter) fetch(ctx context.Context, r *result, values []string) *failure {
	u := *e.url
	u.RawQuery = strings.Trim(u.RawQuery+"&"+values[0], "&")
	header := http.Header{
		"Accept":          {values[1]},
		"Accept-Encoding": {"identity"},
		"User-Agent":      {e.userAgent},
		timeoutHeader:     {seconds(r.told)},
	}
	maps.Copy(header, *e.headers.Load())
	if token := e.token.Load(); token != nil {
		header.Set("Authorization", "Bearer "+*token)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req := (&http.Request{Method: "GET", URL: &u, Header: header, Host: header.Get("Host")}).WithContext(ctx)
	client := http.Client{Transport: e.transport.Load(), CheckRedirect: stayThere}
	resp, err := client.Do(req)
	if err != nil {
		return e.failure(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return e.read(ctx, r, resp, strings.HasPrefix(values[1], protobufMetrics))
	}
	defer time.AfterFunc(time.Second, cancel).Stop() // a reason is not worth a longer wait
	return statusFailure(resp)
}

// statusFailure says what an exporter answered instead of metrics, with the first line of it.
func statusFailure(resp *http.Response) *failure {
	code, hint := resp.StatusCode, cmp.Or(statusHints[resp.StatusCode], statusHints[resp.StatusCode/100])
	if strings.HasPrefix(resp.Header.Get("Www-Authenticate"), "Digest") {
		hint = "it wants a Digest login, which is not supported"
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	line, _, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	said := strings.TrimSuffix(fmt.Sprintf(": %.80q", strings.TrimSpace(hide(line, resp.Request))), `: ""`)
	return fail("status", "the exporter answered %d %s%s", code, http.StatusText(code), said).advise(hint)
}

// statusHints say what to do about a status, 4 being all others that begin with it.
var statusHints = map[int]string{
	4:   "if it wants a login: " + login,
	400: "if it wants TLS, write https://; if it wants another host name: --header NAME:'Host: …'",
	401: "log in with " + login,
	403: "if it wants a login: " + login + "; if a client certificate: --cert-file NAME:FILE",
	404: "is the path right?",
	406: "ask for another format: --header NAME:'Accept: …'",
	429: "ask less often: --max-age NAME:DURATION",
}

const login = "a password in the URL, --bearer-token-file NAME:FILE or --header NAME:@FILE"

// hide returns a line that an exporter sent, without the secrets of the request that it may repeat.
func hide(line string, request *http.Request) string {
	open := []string{"Accept", "Accept-Encoding", "Host", "User-Agent", timeoutHeader}
	_, password, _ := request.BasicAuth()
	for key, values := range request.Header {
		_, token, _ := strings.Cut(values[0], " ")
		for _, secret := range append([]string{password, token}, values...) {
			if len(secret) > 3 && !slices.Contains(open, key) { // a shorter one is in many texts
				line = strings.ReplaceAll(line, secret, "…")
			}
		}
	}
	return line
}

// read reads the body of an answer, which may be protobuf.
func (e *exporter) read(ctx context.Context, r *result, resp *http.Response, mayBeProtobuf bool) *failure {
	contentType := strings.TrimSpace(resp.Header.Get("Content-Type"))
	begin := func(text string) string { // parameters are broken in many ways
		return strings.ToLower(text[:len(text)-len(strings.TrimLeft(text, wordBytes+"/+"))])
	}
	f, known := formats[begin(contentType)]
	shown := begin(hide(contentType, resp.Request))
	_, version, _ := strings.Cut(contentType, "version=")
	version = begin(strings.Trim(version, `"`))
	zipped, unreadable := contentEncoding(strings.Join(resp.Header.Values("Content-Encoding"), ","))
	switch {
	case f.protobuf && !mayBeProtobuf:
		return fail("content_type", "the exporter answered %s, which it was not asked for", shown)
	case f.openMetrics && !slices.Contains([]string{"", "0.0.1", "1.0.0"}, version):
		return fail("content_type", "the exporter answered OpenMetrics %s: only 1.0.0 and 0.0.1 are known",
			hide(version, resp.Request)).advise("--header NAME:'Accept: text/plain' asks for text")
	case unreadable != "":
		return fail("encoding", "the exporter answered in the encoding %s, which it was not asked for", unreadable)
	}
	in := &body{ctx: ctx, src: resp.Body, size: max(resp.ContentLength, 0)}
	hasEnd := zipped || f != format{} || len(resp.TransferEncoding) > 0
	in.untilClose = resp.ContentLength < 0 && !hasEnd
	if zipped {
		// The limit of compressed bytes ends an endless run of empty gzip members.
		z, err := gzip.NewReader(&body{ctx: ctx, src: resp.Body, limit: 2 * e.maxBytes})
		if err != nil {
			return e.readFailure(err, 0)
		}
		in.src = z
	}
	fault := e.intake.read(r, in, f)
	switch {
	case known:
		return fault
	case fault == nil && r.samples() == 0:
		r.bodies = nil
		return fail("content_type", "the exporter answered %s, without a sample", shown)
	case fault != nil && (fault.reason == "parse" || errors.Is(fault.err, errNoNewline)):
		return fail("content_type", "the exporter answered %s: %w", shown, fault.err)
	}
	return fault
}

// formats are those that media types stand for. A body of another type may be text all the same:
// PHP scripts and static files serve metrics as text/html and the like.
var formats = map[string]format{
	"":                                {},
	"text/plain":                      {},
	"application/openmetrics-text":    {openMetrics: true},
	"application/vnd.google.protobuf": {protobuf: true},
	"application/protobuf":            {protobuf: true},
	"application/x-protobuf":          {protobuf: true},
}

// wordBytes are what the names of parameters, and the words of media types, consist of.
const wordBytes = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."

// contentEncoding reports whether a Content-Encoding means gzip, and returns an encoding in it that cannot be read.
func contentEncoding(header string) (zipped bool, unreadable string) {
	for encoding := range strings.SplitSeq(strings.ToLower(header), ",") {
		switch encoding = strings.TrimSpace(encoding); encoding {
		case "gzip", "x-gzip":
			if zipped {
				return false, "gzip, twice"
			}
			zipped = true
		case "aes128gcm", "br", "bzip2", "compress", "dcb", "dcz", "deflate", "exi", "lz4", "lzma", "pack200-gzip",
			"snappy", "x-compress", "x-snappy-framed", "xz", "zstd":
			return false, encoding
		} // what is not an encoding is ignored: some send a charset or a type
	}
	return zipped, ""
}

// failure says why there was no answer, without what errors quote of the URL and of the answer: secrets, maybe.
func (e *exporter) failure(err error) *failure {
	err = withoutURL(err)
	var op *net.OpError
	var otherName x509.HostnameError
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns) && dns.IsTimeout:
		return fail("connect", "lookup %s: no answer", dns.Name).advise("does the name server answer?")
	case errors.As(err, &dns), errors.As(err, &op) && op.Op == "dial":
		return fail("connect", "%w", err)
	case errors.Is(err, errRedirect):
		return fail("status", "%w", err).advise("is that a login page?")
	case errors.Is(err, http.ErrSchemeMismatch), errors.As(err, new(tls.RecordHeaderError)):
		return fail("tls", "the exporter does not speak TLS").advise("write http://")
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return fail("tls", "%w", err).advise("give its CA: --ca-file NAME:FILE")
	case errors.As(err, &otherName) && len(otherName.Certificate.DNSNames)+len(otherName.Certificate.IPAddresses) == 0:
		return fail("tls", "%w", err).advise("it needs a subject alternative name (SAN); until then: --insecure NAME")
	case errors.As(err, &otherName):
		return fail("tls", "%w", err).advise("give the name that is in it: --server-name NAME:HOST")
	case errors.As(err, new(*tls.CertificateVerificationError)):
		return fail("tls", "%w", err)
	// With TLS 1.3 the alert about a missing certificate comes with the first read.
	case errors.As(err, &op) && (op.Op == "remote error" || op.Op == "local error"):
		return fail("tls", "%w", op).advise("if it wants a client certificate, or another: --cert-file NAME:FILE")
	case errors.As(err, &op), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fail("read", "failed to read the answer: %w", err).advise(otherProtocols[e.url.Scheme])
	}
	_, begin, _ := strings.Cut(err.Error(), `malformed HTTP response "`)
	return fail("read", "the answer is not valid HTTP, or its headers are too long").
		advise(otherProtocols[begin[:min(8, len(begin))]])
}

// otherProtocols say what may be spoken when a URL of the scheme gets no answer, or one that begins so.
var otherProtocols = map[string]string{
	"http":     "if it wants TLS, write https://",
	`\x15\x03`: "it wants TLS: write https://",
	"https":    "if it speaks HTTP/2 only: that is not supported",
	`\x00\x00`: "it speaks HTTP/2 only, which is not supported",
}

// withoutURL removes from an error the URL, which may hold secrets, and the local port, which differs each time.
func withoutURL(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		op.Source = nil
	}
	if withURL, ok := errors.AsType[*url.Error](err); ok {
		return withURL.Err
	}
	return err
}

// dial connects to the exporter, first at its IPv4 addresses: some name servers never answer for the others.
// Each has a share of the time. It gives up before the fetch, whose context this is not: its error says more.
func (e *exporter) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout-e.timeout/10)
	defer cancel()
	var dialer net.Dialer
	host, port, _ := net.SplitHostPort(addr)
	if e.socket != "" {
		return dialer.DialContext(ctx, "unix", e.socket)
	}
	if _, err := netip.ParseAddr(host); err == nil { // it may have a zone, which no lookup keeps
		return dialer.DialContext(ctx, network, addr)
	}
	var refused, unknown error // the first of each
	isLocal := strings.EqualFold(host, "localhost")
	for _, version := range [][2]string{{"ip4", "127.0.0.1"}, {"ip6", "::1"}} {
		if isLocal { // without /etc/hosts, a name server would be asked for it
			host = version[1]
		}
		ips, err := e.lookup(ctx, version[0], host)
		unknown = cmp.Or(unknown, err)
		for _, ip := range ips {
			dialer.Timeout = e.timeout / 2 / time.Duration(len(ips))
			conn, err := dialer.DialContext(ctx, network, net.JoinHostPort(ip.String(), port))
			if err == nil {
				return conn, nil
			}
			refused = cmp.Or(refused, err)
		}
	}
	return nil, cmp.Or(refused, unknown)
}

// errRedirect is the failure of an exporter that sends the program elsewhere, or in circles.
var errRedirect = errors.New("a redirect")

// stayThere follows redirects within one scheme, host and port, the host also being that of the Host header.
func stayThere(req *http.Request, via []*http.Request) error {
	first := via[0]
	named := &url.URL{Scheme: first.URL.Scheme, Host: cmp.Or(first.Host, first.URL.Host)}
	host, port := req.URL.Hostname(), effectivePort(req.URL)
	switch {
	case req.URL.Scheme != first.URL.Scheme,
		!strings.EqualFold(host, first.URL.Hostname()) && !strings.EqualFold(host, named.Hostname()),
		port != effectivePort(first.URL) && port != effectivePort(named):
		return fmt.Errorf("%w to another scheme, host or port: %s://%.80s", errRedirect, req.URL.Scheme,
			hide(req.URL.Host+req.URL.EscapedPath(), first))
	case len(via) >= 10:
		return fmt.Errorf("%w after ten others", errRedirect)
	}
	req.URL.Host, req.Host, req.Header = first.URL.Host, first.Host, first.Header
	return nil
}

// effectivePort returns the port of a URL, which may be implied by its scheme.
func effectivePort(u *url.URL) string {
	return cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
}

// setHeaders keeps the headers of header files beside those of the command line.
func (e *exporter) setHeaders(files []flagFile) error {
	headers := e.fixed.Clone()
	for _, f := range files {
		if err := eachLine(f.text, func(line string) error {
			key, value, err := parseHeader(line)
			if key == "Authorization" && (e.fixed.Get(key) != "" || e.tokenFile != "") {
				err = errors.New("a flag gives another login")
			}
			headers.Add(key, value)
			return err
		}); err != nil {
			return f.fault(err)
		}
	}
	e.headers.Store(&headers)
	return nil
}

// setToken keeps the token that a file holds.
func (e *exporter) setToken(files []flagFile) error {
	token := string(bytes.TrimSpace(files[0].text))
	if token == "" || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return files[0].fault(errors.New("want one token, in ASCII and without blanks"))
	}
	e.token.Store(&token)
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
	_, afterScheme, _ := strings.Cut(text, "://")
	authority := afterScheme[:strings.IndexAny(afterScheme+"/", "/?#")]
	host := authority[strings.LastIndexByte(authority, '@')+1:]
	port := host[strings.LastIndexAny(host, "]:")+1:]
	_, query, _ := strings.Cut(text, "?")
	switch {
	case strings.ContainsAny(text, "\r\n"):
		return nil, "", errors.New("the URL holds a newline: does it come from a file?")
	case strings.Contains(strings.TrimSuffix(query, `"`), `"`):
		return nil, "", errors.New(`a quote in the query of the URL: write %22 for "`)
	case strings.ContainsAny(text, " \t\"'`"):
		return nil, "", errors.New("the URL holds a blank or a quote (in a JSON CMD, quotes in a value stay in it)")
	case strings.HasPrefix(text, "http") && strings.Contains(text, ":/") && afterScheme == "":
		return nil, "", errors.New("two slashes are missing: want a URL like http://localhost:9100/metrics")
	case strings.HasPrefix(text, "/") || strings.HasPrefix(text, "."):
		return nil, "", errors.New("this is a file: use --file")
	case !strings.Contains(text, "://") && !strings.ContainsAny(text, "@?"):
		if !strings.Contains(text, "/") {
			text += "/metrics" // most likely
		}
		return nil, "", fmt.Errorf("the scheme is missing: did you mean http://%s?", text)
	case isSocket && rest != "" && rest[0] != '/' && rest[0] != '?':
		return nil, "", errors.New("want http://unix:SOCKET:/PATH: what follows the socket begins with a slash")
	case strings.Contains(afterScheme[len(authority):], "@"):
		return nil, "", errors.New("an @ after the host: write %40; in a password, %2F for /, %3F for ?, %23 for #")
	case strings.Count(host, ":") > 1 && (host[0] != '[' || strings.Contains(strings.ReplaceAll(host, "%25", ""), "%")):
		return nil, "", errors.New("an IPv6 address in a URL is written like [::1], with a zone like [fe80::1%25eth0]")
	case len(port) < len(host) && port != "" && !isPort(port):
		return nil, "", errors.New("the port in the URL is not a number from 0 to 65535")
	case err != nil && strings.Contains(text, "$"):
		return nil, "", errors.New("this is not a URL: nothing expands $ here")
	case err != nil:
		return nil, "", errors.New("this is not a URL")
	case len(socket) > maxSocketPath:
		return nil, "", fmt.Errorf("the path of a socket may have %d bytes, not %d", maxSocketPath, len(socket))
	case u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", strings.HasSuffix(u.Host, ":"),
		isSocket && socket == "":
		return nil, "", errors.New("want a URL like http://localhost:9100/metrics or http://unix:/run/x.sock:/metrics")
	case u.Path == "":
		u.Path = "/metrics"
	}
	return u, socket, nil
}

// maxSocketPath is the longest path that a Unix socket may have on every system, in bytes.
const maxSocketPath = 103

// isPort reports whether text is the number of a port.
func isPort(text string) bool {
	_, err := strconv.ParseUint(text, 10, 16)
	return err == nil
}

// parseHeader parses a header line for an exporter. Its error does not quote it.
func parseHeader(line string) (key, value string, err error) {
	key, value, ok := strings.Cut(line, ":")
	key, value = http.CanonicalHeaderKey(key), strings.TrimSpace(value)
	odd := func(c rune) bool { return c <= ' ' || c > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, c) }
	control := func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }
	switch {
	case !ok || key == "" || strings.ContainsFunc(key, odd):
		err = errors.New("want a header like 'Authorization: Bearer x', or @FILE for a file of such lines")
	case strings.ContainsFunc(value, control):
		err = fmt.Errorf("the value of %s has a control character", key)
	case key == "Connection" && strings.EqualFold(value, "close"): // net/http does so
	case slices.Contains(ownHeaders, key):
		err = fmt.Errorf("%s is set by the program", key)
	}
	return key, value, err
}

// ownHeaders are those of the connection, and those that decide how and when the body comes.
var ownHeaders = []string{"Accept-Encoding", "Connection", "Content-Length", "Expect", "Keep-Alive", "Proxy-Connection",
	"Te", "Trailer", "Transfer-Encoding", "Upgrade", timeoutHeader}

// ---- Files

// files reads the files of a file source.
type files struct {
	*intake                 // whose target is the name of one, or a glob
	mu      sync.Mutex      // guards hangs
	hangs   map[string]bool // files of a glob whose read has not come back
}

// checkPattern says why a file source cannot have the pattern.
func checkPattern(pattern string) error {
	_, err := goGlob(pattern)
	name, isURL := strings.CutPrefix(pattern, "file://")
	switch {
	case err != nil:
		return err
	case pattern == "":
		return errors.New("want a file name or a glob")
	case isURL:
		return fmt.Errorf("want a file name, not a URL: write %s", name)
	case strings.HasPrefix(pattern, "http://") || strings.HasPrefix(pattern, "https://"):
		return errors.New("this is a URL: use --http")
	case len(pattern) > 1 && strings.ContainsAny(pattern[:1], `"'`) && pattern[0] == pattern[len(pattern)-1]:
		return errors.New("the quotes are part of the name: in a JSON CMD or an env file they are not needed")
	case strings.Contains(pattern, "**"):
		return fmt.Errorf("** is not known: write %s", strings.ReplaceAll(pattern, "**", "*"))
	}
	return nil
}

// goGlob returns a shell's glob as path.Match takes it.
func goGlob(glob string) (string, error) {
	glob = strings.NewReplacer(`\\`, `\\`, `\[`, `\[`, "[!", "[^").Replace(glob)
	switch _, err := path.Match(glob, ""); {
	case err != nil:
		return "", errors.New("the glob is malformed: [ needs its ], and \\ something after it")
	case strings.Contains(glob, "[:"):
		return "", errors.New("classes like [:alpha:] are not known: write [a-z]")
	}
	return glob, nil
}

func (fs *files) String() string { return fs.target }

// check opens the file, or looks into the folders of a glob. What matches may come later.
func (fs *files) check() error {
	if hasMeta(fs.target) {
		_, err := fs.expand(context.Background())
		return err
	}
	file, _, err := openRegular(fs.target, "/*.prom")
	file.Close() // to close none does no harm
	return err
}

// arguments returns the default ones: a scraper has nothing to choose.
func (fs *files) arguments(url.Values, accept) (arguments, error) {
	return arguments{standard: true}, nil
}

// fetch reads the files that the pattern matches. The good ones are served even if others fail.
func (fs *files) fetch(ctx context.Context, r *result, _ []string) *failure {
	if !hasMeta(fs.target) {
		return fs.read(ctx, r, fs.target)
	}
	names, err := fs.expand(ctx)
	var failed *failure
	switch {
	case errors.Is(err, errTooLarge):
		return fail("too_large", "%w", err)
	case err != nil:
		failed = fail("file", "%w", err)
	}
	var others []string // that failed, too
	for i, name := range names {
		if ctx.Err() != nil {
			failed = cmp.Or(failed, fail("timeout", "no time was left to read %d files", len(names)-i))
			break
		}
		one := fs.readApart(ctx, r, name)
		r.bodies, r.files = append(r.bodies, one.bodies...), append(r.files, one.files...)
		r.bytes, r.held = one.bytes, one.held
		if failed != nil && one.failure != nil {
			others = append(others, name)
		}
		failed = cmp.Or(failed, one.failure)
	}
	if len(others) > 0 {
		failed.err = fmt.Errorf("%w; and %s", failed.err, fewOf(others, 8))
	}
	return failed
}

// fewOf joins the first names, no more than most, and says how many more there are.
func fewOf(names []string, most int) string {
	more := ""
	if n := len(names) - most; n > 0 {
		names, more = names[:most], fmt.Sprintf(" and %d more", n)
	}
	return strings.Join(names, ", ") + more
}

// readApart reads a file of a glob into a result of its own, which goes on from r. A read that does
// not come back, from a dead disk say, costs the rest of its fetch; the next ones leave the file out.
func (fs *files) readApart(ctx context.Context, r *result, name string) *result {
	const most = 16 // reads that hang: each keeps a thread
	fs.mu.Lock()
	hangs := fs.hangs[name] || len(fs.hangs) >= most
	if !hangs {
		fs.hangs[name] = true // for all one knows
	}
	fs.mu.Unlock()
	missing := &result{bytes: r.bytes, held: r.held}
	missing.failure = fail("timeout", "%s: its read does not come back", name)
	if hangs {
		return missing
	}
	one, back := &result{bytes: r.bytes, held: r.held}, make(chan *result, 2)
	go func() {
		one.failure = recovered(one, func() *failure { return fs.read(ctx, one, name) })
		fs.mu.Lock()
		delete(fs.hangs, name)
		fs.mu.Unlock()
		back <- one
	}()
	defer context.AfterFunc(ctx, func() {
		time.Sleep(overdueAfter / 2) // what does not hang ends with ctx
		back <- missing
	})()
	return <-back
}

// expand returns what the glob matches, sorted folder by folder. A folder that cannot be read is an
// error beside the matches of others; a missing one is no match unless it is before the first *.
func (fs *files) expand(ctx context.Context) (matches []string, err error) {
	pattern, _ := goGlob(fs.target)
	fixed := pattern[:strings.LastIndexByte(pattern[:strings.IndexAny(pattern, meta)], '/')+1]
	matches = []string{fixed}
	room := fs.maxBytes // for all names, so that folders that hold each other are no flood
	for i, element := range strings.Split(pattern[len(fixed):], "/") {
		var next []string
		for _, folder := range matches {
			if i > 0 {
				folder += "/"
			}
			found, fault := matchIn(ctx, folder, element, &room)
			switch missing := errors.Is(fault, os.ErrNotExist) || errors.Is(fault, syscall.ENOTDIR); {
			case room < 0:
				return nil, fmt.Errorf("the names that %s matches: %w", fs.target, errTooLarge)
			case ctx.Err() != nil:
				return nil, ctx.Err()
			case fault != nil && (i == 0 || !missing):
				err = cmp.Or(err, fault)
			}
			next = append(next, found...)
		}
		matches = next
	}
	return matches, err
}

// matchIn returns what one element of a glob matches in a folder. It ends once room is used up.
func matchIn(ctx context.Context, folder, element string, room *int64) (found []string, err error) {
	if !hasMeta(element) {
		if _, err = os.Lstat(folder + element); err != nil {
			return nil, err
		}
		return []string{folder + element}, nil
	}
	dir, err := os.OpenFile(cmp.Or(folder, "."), os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	for err == nil && ctx.Err() == nil && *room >= 0 {
		var names []string
		names, err = dir.Readdirnames(1000) // then EOF
		for _, name := range names {
			hidden := strings.HasPrefix(name, ".") && !strings.HasPrefix(strings.TrimPrefix(element, `\`), ".")
			if matches, _ := path.Match(element, name); matches && !hidden {
				found = append(found, folder+name)
				*room -= int64(len(folder+name)) + 16 // and the string's own
			}
		}
	}
	slices.Sort(found)
	if err == io.EOF {
		err = nil
	}
	return found, err
}

// hasMeta reports whether a pattern is more than the name of one file.
func hasMeta(pattern string) bool { return strings.ContainsAny(pattern, meta) }

// meta are the characters that make a glob.
const meta = `*?[\`

// read adds one file to a result. A file that changes while it is read has failed.
func (fs *files) read(ctx context.Context, r *result, name string) *failure {
	file, before, err := openRegular(name, "/*.prom")
	if err != nil {
		return fail("file", "%w", err)
	}
	defer file.Close()
	shown := name
	if !utf8.ValidString(name) {
		shown = strconv.Quote(name) // different names stay different
	}
	r.files = append(r.files, fileTime{shown, before.ModTime()})
	end := make([]byte, min(before.Size(), 4<<10)) // holds a short last line and some blank ones
	n, _ := file.ReadAt(end, before.Size()-int64(len(end)))
	end = end[:n]
	openMetrics := endsOpenMetrics(end)
	// Gzip and UTF-16 end in a NUL byte: the parser knows them.
	if len(end) > 0 && end[len(end)-1] != '\n' && end[len(end)-1] != 0 && !openMetrics {
		return fail("file", "%s does not end in a newline: it may be half written", name).
			advise("write it elsewhere, with a newline at its end, and rename it")
	}
	in := &body{ctx: ctx, src: file, size: before.Size()}
	if f := fs.intake.read(r, in, format{openMetrics: openMetrics}); f != nil {
		f.err = fmt.Errorf("%s: %w", name, f.err)
		return f
	}
	after, err := file.Stat()
	if err != nil || after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
		r.bodies = r.bodies[:len(r.bodies)-1]
		return fail("file", "%s changed while it was read: write it elsewhere and rename it", name)
	}
	return nil
}

// openRegular opens a regular file. It refuses anything else before opening it: opening
// a device can have side effects, and opening a FIFO blocks. glob is what to add to a folder's name.
func openRegular(name, glob string) (*os.File, os.FileInfo, error) {
	info, err := os.Stat(name)
	switch {
	case err == nil && info.IsDir() && glob != "":
		return nil, nil, fmt.Errorf("%s is a folder: write %s%s", name, strings.TrimRight(name, "/"), glob)
	case err == nil && !info.Mode().IsRegular():
		return nil, nil, fmt.Errorf("%s is not a regular file", name)
	}
	file, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // in case it has just become one of these
	if err != nil {
		return nil, nil, err
	}
	if info, err = file.Stat(); err != nil || !info.Mode().IsRegular() {
		file.Close()
		return nil, nil, fmt.Errorf("%s is not a regular file any more", name)
	}
	return file, info, nil
}

// ---- Commands

// command runs the command of an exec source.
type command struct {
	*intake
	commandLine
}

// check looks at the program.
func (c *command) check() error {
	if err := programFault(c.program, nil); err != nil {
		return fmt.Errorf("%s: %w", c, err)
	}
	return nil
}

// fetch runs the command and reads its output.
func (c *command) fetch(ctx context.Context, r *result, values []string) *failure {
	out, failure := c.run(ctx, r, values)
	if failure != nil {
		r.bytes = int64(len(out))
		return failure
	}
	return c.intake.read(r, &body{ctx: ctx, src: bytes.NewReader(out), size: int64(len(out))},
		format{openMetrics: endsOpenMetrics(out)})
}

// commandLine is a command line: words, and the URL parameters that placeholders in them take.
type commandLine struct {
	program string // the first word, which has no placeholder
	words   []string
	params  []param
}

// param is a URL parameter that a command takes.
type param struct {
	name    string
	spelled []string // its placeholders, with their braces
	choices []string // the default first; none if there is no default; if there are several, no others are taken
	begins  bool     // a word may begin with its value
}

// parseCommand parses a command line: words, as a shell quotes them, with placeholders.
func parseCommand(line string) (*commandLine, error) {
	words, err := splitWords(line)
	if err != nil {
		return nil, err
	}
	if len(words) == 0 || words[0] == "" {
		return nil, errors.New("there is no command")
	}
	c := &commandLine{words: words, program: strings.NewReplacer("{{", "{", "}}", "}").Replace(words[0])}
	for i, word := range words {
		if err := c.parseWord(word); err != nil {
			return nil, err
		}
		if i == 0 && len(c.params) > 0 {
			return nil, errors.New("the command itself cannot be a placeholder")
		}
	}
	return c, nil
}

// splitWords splits a line at blanks, except those quoted by '…', "…" or a backslash, like a shell.
func splitWords(line string) ([]string, error) {
	var words []string
	var word, shape []byte // shape is the line with an x for each quoted byte
	inWord, quote := false, byte(0)
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case quote == 0 && (c == ' ' || c == '\t' || c == '\n'):
			if inWord {
				words = append(words, string(word))
				shape = append(shape, ' ')
				word, inWord = word[:0], false
			}
			continue
		case c == quote:
			quote = 0
		case quote == 0 && (c == '\'' || c == '"'):
			open := strings.NewReplacer("{{", "", "}}", "").Replace(string(word))
			if strings.LastIndex(open, "{") > strings.LastIndex(open, "}") {
				return nil, errQuotedDefault
			}
			quote = c
		case c == '\\' && quote != '\'':
			if i++; i == len(line) {
				return nil, errors.New(`a \ with nothing after it`)
			}
			if line[i] == '\n' { // a line continuation does not begin a word
				continue
			}
			if quote == '"' && strings.IndexByte("\"\\$`", line[i]) < 0 {
				word = append(word, '\\')
			}
			word, shape = append(word, line[i]), append(shape, 'x')
		case quote != 0:
			word, shape = append(word, c), append(shape, 'x')
		default:
			word, shape = append(word, c), append(shape, c)
		}
		inWord = true
	}
	if quote != 0 {
		return nil, fmt.Errorf("the quote %c is not closed", quote)
	}
	if inWord {
		words = append(words, string(word))
	}
	return words, refuseShell(line, string(shape))
}

// refuseShell refuses words that only a shell understands, without quoting them: they may be secret.
func refuseShell(line, shape string) error {
	first, _, _ := strings.Cut(shape, " ")
	if name, _, ok := strings.Cut(first, "="); ok && isBareLabel([]byte(name)) {
		return fmt.Errorf("only a shell sets a variable before a command: write NAME=env %s=…", name)
	}
	for word := range strings.FieldsSeq(shape) {
		operator := strings.TrimLeft(word, "0123456789")
		if operator == "" || strings.IndexByte("|&;<>", operator[0]) < 0 && !strings.HasSuffix(word, ";") {
			continue
		}
		instead := `sh -c '…', with '\'' for each ' in it, or quote them`
		switch {
		case strings.Contains(shape, "{"):
			instead = `sh -c '…' sh {x}, with "$1" in the script for {x}`
		case !strings.Contains(line, "'"):
			instead = "sh -c '…', or quote them"
		case !strings.ContainsAny(line, `"\`):
			instead = `sh -c "…", or quote them`
		}
		return fmt.Errorf("there is no shell, so | & ; < and > mean nothing: write NAME=%s", instead)
	}
	return nil
}

// parseWord adds the parameters of a word: {{ and }} are braces, others enclose placeholders.
func (c *commandLine) parseWord(word string) error {
	begins := true // other values before one that begins the word may be empty
	for {
		i := strings.IndexAny(word, "{}")
		if i < 0 {
			return nil
		}
		begins, word = begins && i == 0, word[i:]
		if strings.HasPrefix(word, "{{") || strings.HasPrefix(word, "}}") {
			begins, word = false, word[2:]
			continue
		}
		placeholder, rest, closed := strings.Cut(word[1:], "}")
		if word[0] == '}' || !closed {
			return errors.New("a brace without its other half: {{ and }} are literal braces")
		}
		if err := c.addParam(placeholder, begins); err != nil {
			return err
		}
		word = rest
	}
}

// addParam adds the parameter of a placeholder, NAME, NAME=DEFAULT or NAME=ONE|OTHER.
func (c *commandLine) addParam(placeholder string, begins bool) error {
	name, text, hasDefault := strings.Cut(placeholder, "=")
	choices := strings.Split(text, "|")
	i := slices.IndexFunc(c.params, func(other param) bool { return other.name == name })
	switch {
	case strings.Trim(name, wordBytes) != "", name == "", name == "exporter_name":
		return errors.New("a placeholder is {NAME}, {NAME=DEFAULT} or {NAME=ONE|OTHER}; {{ and }} are literal braces")
	case strings.ContainsAny(text, `'"`):
		return errQuotedDefault
	case i < 0:
		i = len(c.params)
		c.params = append(c.params, param{name: name})
	case hasDefault && c.params[i].choices != nil && !slices.Equal(c.params[i].choices, choices):
		return fmt.Errorf("the placeholder {%s} has two different defaults", name)
	}
	p := &c.params[i]
	if hasDefault {
		p.choices = choices
	}
	p.spelled, p.begins = append(p.spelled, "{"+placeholder+"}"), p.begins || begins
	return nil
}

// errQuotedDefault is the fault of {l="x"}, most likely a label.
var errQuotedDefault = errors.New("a default cannot hold a quote; {{ and }} are literal braces")

// String returns the command without its arguments. If the whole command was in quotes, it is one word with blanks.
func (c *commandLine) String() string {
	name, _, cut := strings.Cut(c.program, " ")
	if cut {
		name += " …"
	}
	return name
}

// needs returns a parameter without a default, "" if all have one.
func (c *commandLine) needs() string {
	for _, p := range c.params {
		if len(p.choices) == 0 {
			return p.name
		}
	}
	return ""
}

// doubts says what is likely not meant: braces of labels, of awk or of a template, and what only a shell expands.
func (c *commandLine) doubts() (doubts []string) {
	for _, word := range c.words {
		for _, p := range c.params {
			before, _, found := strings.Cut(word, p.spelled[0])
			before = before[strings.LastIndexAny(before, " \t\n")+1:]
			isScript := strings.HasSuffix(c.program, "awk") && p.choices == nil
			if found && len(p.choices) < 2 && (isScript || isBareLabel([]byte(before))) {
				doubts = append(doubts, fmt.Sprintf("%s is a placeholder for the URL parameter %s; "+
					"literal braces are {%[1]s}", p.spelled[0], p.name))
			}
		}
		_, template, _ := strings.Cut(strings.ReplaceAll(word, "{{{{", ""), "{{.")
		if template, _, found := strings.Cut(template, "}}"); found {
			doubts = append(doubts, fmt.Sprintf("%s gets {.%s}; for {{.%[2]s}} write {{{{.%[2]s}}}}", c, template))
		}
		if !strings.ContainsAny(word, " \t\n") { // or it may be a script
			doubts = append(doubts, unexpanded(word, strings.Contains(word, "/"))...)
		}
	}
	return doubts
}

// unexpanded says that a text holds what only a shell expands: a ~, a $, or with star a *.
func unexpanded(text string, star bool) []string {
	_, variable, _ := strings.Cut(text, "$")
	switch {
	case strings.Contains(text, "~/"):
		return []string{"nothing expands ~ here"}
	case variable != "" && (isBareLabel([]byte(variable[:1])) || strings.ContainsAny(variable[:1], "{(")):
		return []string{"nothing expands $ here"}
	case star && strings.Contains(text, "*"):
		return []string{"nothing expands * here"}
	}
	return nil
}

// arguments returns the values that the parameters take from a query.
func (c *commandLine) arguments(query url.Values, _ accept) (arguments, error) {
	a := arguments{standard: true}
	for _, p := range c.params {
		given, fault := query[p.name], ""
		if given == nil {
			given = p.choices[:min(1, len(p.choices))]
		}
		switch {
		case len(given) == 0:
			fault = "is missing"
		case len(given) > 1:
			fault = "is there twice"
		case slices.Contains(p.choices, given[0]): // it is from the command line
		case len(p.choices) > 1:
			fault = "has none of its values"
		case len(given[0]) > 1<<10:
			fault = "is longer than 1 KiB"
		case !utf8.ValidString(given[0]):
			fault = "is not UTF-8"
		case strings.ContainsFunc(given[0], unicode.IsControl):
			fault = "holds a control character"
		case strings.HasPrefix(given[0], "-") && p.begins:
			fault = "begins with -"
		}
		if fault != "" {
			return arguments{}, fmt.Errorf("the parameter %s %s", p.name, fault)
		}
		a.standard = a.standard && len(p.choices) > 0 && given[0] == p.choices[0]
		a.values = append(a.values, given[0])
		a.id += strconv.Quote(given[0])
	}
	return a, nil
}

// args returns the words of the command with the values of the parameters filled in.
func (c *commandLine) args(values []string) []string {
	pairs := []string{"{{", "{", "}}", "}"}
	for i, p := range c.params {
		for _, placeholder := range p.spelled {
			pairs = append(pairs, placeholder, values[i])
		}
	}
	args, filler := slices.Clone(c.words), strings.NewReplacer(pairs...)
	for i, word := range args {
		args[i] = filler.Replace(word)
	}
	return args
}

// run runs the command until its first process ends or ctx is done. Then its whole group is killed,
// and what was written by then is read. It returns standard output, just over --max-bytes at most.
func (c *command) run(ctx context.Context, r *result, values []string) ([]byte, *failure) {
	ctx, end := context.WithCancel(ctx)
	defer end()
	cmd := inGroup(ctx, c.args(values))
	cmd.Env = append(os.Environ(), "SCRAPE_TIMEOUT_SECONDS="+seconds(r.told))
	out, errs, err := c.start(cmd)
	defer out.Close() // to close a pipe that there is not does no harm
	defer errs.Close()
	if err != nil {
		return nil, fail("start", "failed to start %s: %w", c, programFault(c.program, err))
	}

	var body []byte
	var last tail
	var open bool
	var readers sync.WaitGroup
	readers.Go(func() {
		if body, open = readPipe(out, c.maxBytes+1); int64(len(body)) > c.maxBytes {
			end()
		}
	})
	readers.Go(func() { io.Copy(&last, errs) })
	err = cmd.Wait()
	killed := ctx.Err() != nil
	// The first process has been reaped. Its number could only be another group's if all numbers had been used since.
	left := signalGroup(cmd, syscall.SIGKILL)
	patience := time.Now().Add(100 * time.Millisecond) // with one that left the group and holds a pipe
	out.SetReadDeadline(patience)
	errs.SetReadDeadline(patience)
	readers.Wait()
	r.stderr = string(last)
	if code := cmd.ProcessState.ExitCode(); !killed && code >= 0 { // no signal ended it
		r.exit = &code
	}

	switch {
	case int64(len(body)) > c.maxBytes:
		return body, c.readFailure(errTooLarge, int64(len(body)))
	case killed:
		return body, fail("exit", "was ended before it was done")
	case err != nil && !(c.anyExit && r.exit != nil):
		return body, fail("exit", "ended with %w", err)
	case (left || open) && len(body) > 0 && body[len(body)-1] != '\n':
		return body, fail("exit", "its output lacks the last newline: a process that it left behind was still to write")
	}
	return body, nil
}

// inGroup returns a command with a process group of its own, which gets SIGTERM once ctx is done.
func inGroup(ctx context.Context, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 200 * time.Millisecond // for a trap that tidies up
	cmd.Cancel = func() error {
		signalGroup(cmd, syscall.SIGTERM)
		return nil
	}
	return cmd
}

// signalGroup signals all processes of a command, and reports whether its group has one.
func signalGroup(cmd *exec.Cmd, signal syscall.Signal) bool {
	cmd.Process.Signal(signal) // it may have left the group
	return syscall.Kill(-cmd.Process.Pid, signal) == nil
}

// start starts a command and returns the pipes that it writes to: os/exec would close its own at a deadline, unread.
func (c *command) start(cmd *exec.Cmd) (out, errs *os.File, err error) {
	c.starts.Lock() // or another command, forked meanwhile, would hold the pipes open until its exec
	defer c.starts.Unlock()
	out, outside, err1 := os.Pipe()
	errs, errside, err2 := os.Pipe()
	if err = cmp.Or(err1, err2); err == nil {
		cmd.Stdin = strings.NewReader("") // there may be no /dev/null
		cmd.Stdout, cmd.Stderr = outside, errside
		err = cmd.Start()
	}
	outside.Close()
	errside.Close()
	return out, errs, err
}

// readPipe reads a pipe to its end, limit or deadline, and then what was written in time. open: it has a writer.
func readPipe(pipe *os.File, limit int64) (text []byte, open bool) {
	text, err := io.ReadAll(io.LimitReader(pipe, limit))
	raw, fault := pipe.SyscallConn()
	if !errors.Is(err, os.ErrDeadlineExceeded) || fault != nil {
		return text, false
	}
	rest := make([]byte, 16*os.Getpagesize()) // as much as a pipe holds
	raw.Control(func(fd uintptr) {
		n, _ := syscall.Read(int(fd), rest)
		text = append(text, rest[:max(n, 0)]...)
		n, _ = syscall.Read(int(fd), rest[:1])
		open = n != 0 // it has more, or fails with EAGAIN
	})
	return text, open
}

// tail keeps the last 4 KiB of what is written to it.
type tail []byte

func (t *tail) Write(b []byte) (int, error) {
	*t = append(*t, b...)
	*t = append((*t)[:0], (*t)[max(0, len(*t)-4<<10):]...)
	return len(b), nil
}

// programFault says what is wrong with a program, by a look at it and by the error of its start, if any.
func programFault(name string, err error) error {
	_, missing := exec.LookPath(name)
	info, statErr := os.Stat(name)
	switch {
	case missing != nil && strings.Contains(name, " "):
		return errors.New("there is no such program: with the whole command in quotes, it is one word")
	case errors.Is(missing, exec.ErrNotFound):
		return errors.New("there is no such program in PATH")
	case errors.Is(missing, os.ErrPermission) && statErr == nil && info.Mode()&0o111 == 0:
		return fmt.Errorf("it is not executable: chmod +x %s", name)
	case errors.Is(missing, os.ErrPermission) && statErr == nil:
		return errors.New("permission denied: may this user run it, or is its file system mounted noexec?")
	case missing == nil && errors.Is(err, syscall.ENOENT):
		return errors.New("the interpreter that its #! line names, or its loader, is missing" +
			" (an image from scratch has no shell; a #! line needs Unix line ends)")
	case missing == nil && errors.Is(err, syscall.ENOEXEC):
		return errors.New("it has no #! line, or is built for another kind of machine")
	}
	err = cmp.Or(missing, err)
	for errors.Unwrap(err) != nil { // the innermost does not tell the name
		err = errors.Unwrap(err)
	}
	return err
}

// ---- Counts

// reasons are what a source of each kind can fail for: the metrics show these.
var reasons = map[string][]string{
	"http": {"busy", "connect", "content_type", "encoding", "internal", "parse", "read", "status", "timeout", "tls",
		"too_large"},
	"file": {"busy", "file", "internal", "parse", "read", "timeout", "too_large"},
	"exec": {"busy", "exit", "internal", "parse", "start", "timeout", "too_large"},
}

// status is what a source's fetches came to, for the metrics, the log and the page at /.
type status struct {
	fetches     uint64
	failures    map[string]uint64 // by reason
	lastSuccess time.Time
	last        lastFetch

	since           time.Time // when the fetches of last's outcome, good or bad, began; zero before the first
	lastFailure     *failure  // of a fetch with default arguments; nil before the first
	lastFailureTime time.Time

	unlogged int                    // changes that the log does not know
	changes  [flapping + 1]struct { // of the source's state, the latest first
		at    time.Time
		state string // "up", or a reason and the part of its error that stays
	}
}

// lastFetch is what the last fetch with default arguments came to.
type lastFetch struct {
	duration time.Duration
	samples  int
	bytes    int64
	failure  *failure
}

// snapshot returns what was counted so far.
func (w *waterfall) snapshot() status {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := w.status
	st.failures = maps.Clone(st.failures)
	return st
}

// count counts a fetch. It returns how many changes of the source's state the log is to tell.
func (st *status) count(standard bool, r *result) (changes int) {
	st.fetches++
	before, state := st.changes[0].state, "up"
	if r.failure != nil {
		state = r.failure.reason + " " + r.failure.err.Error()
		for _, varies := range []string{`"`, " (", "line ", "current time", "read udp"} { // from there on
			state, _, _ = strings.Cut(state, varies)
		}
		st.failures[r.failure.reason]++
	} else {
		st.lastSuccess = r.end
	}
	if !standard {
		return 0
	}
	st.last = lastFetch{r.end.Sub(r.start), r.samples(), r.bytes, r.failure}
	if before == "" || (before == "up") != (state == "up") {
		st.since = r.end
	}
	if r.failure != nil {
		st.lastFailure, st.lastFailureTime = r.failure, r.end
	}
	now := time.Now()
	if before != state {
		copy(st.changes[1:], st.changes[:])
		st.changes[0].at, st.changes[0].state = now, state
		st.unlogged++
	}
	if now.Sub(st.changes[flapping].at) >= flappingTime {
		changes, st.unlogged = st.unlogged, 0
	}
	return changes
}

// More changes of a source's state than flapping within flappingTime are summed up in the log.
const flapping, flappingTime = 5, 10 * time.Minute

// logFetch logs changes of a source's state for all to see, and once that it gives a series twice.
func logFetch(log *slog.Logger, twice *sync.Once, r *result, changes int) {
	if i := slices.IndexFunc(r.bodies, func(e *exposition) bool { return e.twice != "" }); i >= 0 {
		const message = "a series is there twice: all are handed on, and Prometheus keeps one"
		twice.Do(func() { log.Warn(message, "metric", r.bodies[i].twice) })
	}
	if r.failure == nil && r.stderr != "" {
		log.Debug("the command wrote to standard error", "stderr", r.stderr)
	}
	level, message, quiet := slog.LevelInfo, "source is up", "fetched"
	if f := r.failure; f != nil {
		level, message, quiet = slog.LevelWarn, "source is down", "fetch failed"
		log = log.With("reason", f.reason, "err", f.err)
		if detail := cmp.Or(f.detail, r.stderr); detail != "" {
			log = log.With("stderr", detail)
		}
		log = log.With("hint", f.hint)
	} else if changes > 0 && r.samples() == 0 {
		log = log.With("samples", 0)
	}
	if changes > 1 {
		log = log.With("unlogged_changes", changes-1)
	}
	if changes > 0 {
		log.Log(context.Background(), level, message)
	} else {
		log.Debug(quiet, "duration", r.end.Sub(r.start), "samples", r.samples(), "bytes", r.bytes)
	}
}
