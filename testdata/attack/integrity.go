//go:build linux

package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Integrity is a scenario of any length, with sources whose samples have a number of their
// generation for a value. Scrapers of all kinds read pages while files are renamed, exporters reload,
// types come into conflict and clients leave, and each page is compared line by line with what
// its generations were. A line a minute tells how it goes.

var howLong = flag.Duration("for", 3*time.Minute, "how long the scenario integrity takes")

// stream is a source. All samples of one of its bodies have the same number.
type stream struct {
	name   string
	size   int           // samples of its own family
	kept   time.Duration // its --max-age
	open   bool          // it is OpenMetrics
	slow   bool          // it takes long, and whoever waits for it holds what the others have told meanwhile
	isFile bool          // it does not tell when it is read
	shares bool          // it also has samples of the family shared,
	clash  bool          // which has another type in every other generation

	mu          sync.Mutex // guards generations
	generations []generation
}

// generation is one body of a stream, made by one run of an exporter or a command, or by a rename.
type generation struct {
	form  string    // the Accept header that it was asked for with, if any
	began time.Time // after the run that it is for
	ended time.Time // before that run does, zero until then
	dead  bool      // its run was cancelled, so that another may have begun before it
}

// sharedSize is how many samples of the family shared a stream has.
const sharedSize = 20

// begin begins a generation and returns its number.
func (s *stream) begin(form string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.generations[max(0, len(s.generations)-100):] { // so that there is one string of each form
		if before := s.generations[len(s.generations)-1-i].form; before == form {
			form = before
			break
		}
	}
	s.generations = append(s.generations, generation{form: form, began: time.Now()})
	return len(s.generations) - 1
}

// end notes that a generation is written.
func (s *stream) end(n int, dead bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generations[n].ended, s.generations[n].dead = time.Now(), dead
}

// get returns a generation, and when the next one of its form began.
func (s *stream) get(n int) (g generation, next time.Time, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n < 0 || n >= len(s.generations) {
		return g, next, false
	}
	g = s.generations[n]
	for _, other := range s.generations[n+1:] {
		if other.form == g.form && !other.dead && !other.ended.IsZero() && !other.began.Before(g.ended) {
			return g, other.began, true
		}
	}
	return g, next, true
}

// body returns that of a generation.
func (s *stream) body(n int) string {
	var b strings.Builder
	value := strconv.Itoa(n)
	family, sampleType := "a_"+s.name, "gauge"
	if s.open {
		sampleType = "counter"
	}
	fmt.Fprintf(&b, "# HELP %s What is measured.\n# TYPE %s %s\n", family, family, sampleType)
	for i := range s.size {
		fmt.Fprintf(&b, `%s{i="%d",of="everything that is measured"} %s`, s.metric(), i, value)
		if s.open {
			b.WriteString(` # {generation="` + value + `"} ` + value)
		}
		b.WriteByte('\n')
	}
	if s.shares {
		fmt.Fprintf(&b, "# TYPE shared %s\n", s.typeOfShared(n))
		for i := range sharedSize {
			fmt.Fprintf(&b, "shared{i=\"%d\"} %s\n", i, value)
		}
	}
	if s.open {
		b.WriteString("# EOF\n")
	}
	return b.String()
}

// metric is the name of the samples of its own family.
func (s *stream) metric() string {
	if s.open {
		return "a_" + s.name + "_total"
	}
	return "a_" + s.name
}

// typeOfShared is the type of the family shared in a generation.
func (s *stream) typeOfShared(n int) string {
	if s.clash && n%2 == 1 {
		return "counter"
	}
	return "gauge"
}

// export is an exporter whose bodies come in two parts.
func (s *stream) export(w http.ResponseWriter, r *http.Request) {
	n := s.begin(r.Header.Get("Accept"))
	if s.open {
		w.Header().Set("Content-Type", "application/openmetrics-text; version=1.0.0; charset=utf-8")
	}
	body := s.body(n)
	half := rand.IntN(len(body))
	io.WriteString(w, body[:half])
	http.NewResponseController(w).Flush()
	pause := 3*time.Millisecond + rand.N(20*time.Millisecond) // in which a client is seen to have left
	if s.slow {
		pause += slack + 500*time.Millisecond
	}
	sleep(r.Context(), pause)
	io.WriteString(w, body[half:])
	s.end(n, r.Context().Err() != nil)
}

// rename renames bodies into place, one after the other.
func (s *stream) rename(ctx context.Context, name string) {
	for ctx.Err() == nil {
		n := s.begin("")
		os.WriteFile(name+".new", []byte(s.body(n)), 0o600)
		os.Rename(name+".new", name)
		s.end(n, false)
		sleep(ctx, rand.N(100*time.Millisecond))
	}
}

// pipe gives each process that opens a file a body of its own: the file is a new pipe for each.
func (s *stream) pipe(ctx context.Context, name string) {
	for ctx.Err() == nil {
		pipe, err := os.OpenFile(name, os.O_WRONLY, 0) // until a process reads
		if err != nil {
			return
		}
		n := s.begin("")
		syscall.Mkfifo(name+".new", 0o600)
		os.Rename(name+".new", name)
		body := s.body(n)
		half := rand.IntN(len(body))
		io.WriteString(pipe, body[:half])
		sleep(ctx, rand.N(20*time.Millisecond))
		io.WriteString(pipe, body[half:])
		s.end(n, false)
		pipe.Close()
	}
}

// integrity are the streams of the scenario and what was found so far.
type integrity struct {
	streams []*stream

	mu      sync.Mutex // guards all below
	pages   int
	samples int
	joined  int           // results of a run that had begun before the scrape
	lag     time.Duration // longest from the end of an exporter's or a command's body to a scrape that got it
	faults  int
	scrapes int   // most that a page has counted so far
	memory  []int // in MB, each second
	files   []int // descriptors, each second
}

// generations prepares the streams.
func generations(a *arena) []string {
	file := &stream{name: "file", size: 5000, shares: true, isFile: true}
	glob := &stream{name: "glob", size: 300, isFile: true}
	pipe := &stream{name: "exec", size: 1500}
	exporters := []*stream{
		{name: "text", size: 5000, shares: true},
		{name: "open", size: 500, open: true},
		{name: "clash", size: 20, shares: true, clash: true},
		{name: "slow", size: 100, slow: true},
		{name: "aged", size: 100, kept: time.Second},
	}
	a.integrity, a.login = &integrity{streams: append(exporters, file, glob, pipe)}, true
	at := func(name string) string { return filepath.Join(a.dir, name) }
	os.Mkdir(at("glob"), 0o700)
	syscall.Mkfifo(at("pipe"), 0o600)
	go file.rename(a.ctx, at("file.prom"))
	go glob.rename(a.ctx, at("glob/one.prom"))
	go pipe.pipe(a.ctx, at("pipe"))
	a.rotate()
	flags := []string{"--web.basic-auth-file", at("users"), "--bearer-token-file", "text:" + a.file("token", "0\n"),
		"--file", "file=" + at("file.prom"), "--file", "glob=" + at("glob/*.prom"),
		"--exec", "exec=cat " + at("pipe"), "--max-age", "aged:1s"}
	for _, s := range exporters {
		flags = append(flags, "--http", s.name+"="+a.serve(s.export))
	}
	return flags
}

// kinds are what scrapers take.
var kinds = []struct {
	name, accept string
	zipped       bool
}{
	{"Prometheus 3", "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6," +
		"application/openmetrics-text;version=0.0.1;q=0.5," +
		"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", true},
	{"text as it came", "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3", false},
	{"strict, compressed", "", true},
	{"strict", "", false},
}

// mixed is any hostile traffic.
func mixed(ctx context.Context, a *arena, c *client) {
	query := "/metrics?exporter_name=file"
	for _, s := range a.integrity.streams {
		if rand.IntN(2) == 0 {
			query += "&exporter_name=" + s.name
		}
	}
	switch kind := rand.IntN(100); {
	case kind < 40: // leaves before or in the midst of the answer
		if conn, err := c.send(ctx, query); err == nil {
			sleep(ctx, rand.N(30*time.Millisecond))
			conn.Close()
		}
	case kind < 60:
		accept := kinds[rand.IntN(len(kinds))].accept
		c.ask(ctx, query, func(r *http.Request) {
			zipped(r)
			r.Header.Set("Accept", accept)
			r.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", fmt.Sprint(rand.Float64()/2))
		})
	case kind < 75: // reads slowly, and leaves some time
		slow, cancel := context.WithTimeout(ctx, rand.N(10*time.Second))
		defer cancel()
		c.readSlowly(slow, "/metrics")
	case kind < 85:
		c.ask(ctx, "/", nil)
	case kind < 97:
		c.ask(ctx, "/metrics?x="+invented(), zipped)
	default:
		c.ask(ctx, "/metrics", func(r *http.Request) { r.SetBasicAuth("prometheus", invented()) })
	}
}

// readAll has scrapers of all kinds read pages until the end, and tells every minute what was found.
func readAll(ctx context.Context, a *arena) (o outcome, faults []error) {
	in, begun := a.integrity, time.Now()
	ctx, stop := context.WithTimeout(ctx, *howLong)
	defer stop()
	var all sync.WaitGroup
	for i := range 6 * len(kinds) {
		all.Go(func() { in.readAs(ctx, a, i) })
	}
	all.Go(func() { reload(ctx, a) })
	const row = "%8v %9v %12v %9v %9v %7v %7v %12v %8v\n"
	fmt.Printf(row, "after", "pages", "samples", "joined", "lag", "faults", "memory", "descriptors", "CPU")
	before := a.cpu()
	for second := 1; ctx.Err() == nil; second++ {
		sleep(ctx, time.Second)
		files, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.program.Process.Pid))
		in.mu.Lock()
		in.memory, in.files = append(in.memory, a.memory("VmRSS")), append(in.files, len(files))
		if second%60 == 0 {
			now := a.cpu()
			fmt.Printf(row, time.Since(begun).Round(time.Second),
				in.pages, in.samples, in.joined, in.lag.Round(10*time.Microsecond),
				in.faults, fmt.Sprintf("%d MB", slices.Max(in.memory[second-60:])), slices.Max(in.files[second-60:]),
				fmt.Sprintf("%.0f %%", (now-before).Seconds()/0.6))
			before = now
		}
		in.mu.Unlock()
	}
	all.Wait()
	fmt.Printf("%d samples on %d pages, %d faults; %d results were joined, "+
		"none of which had ended more than %v before its scrape\n",
		in.samples, in.pages, in.faults, in.joined, in.lag.Round(10*time.Microsecond))
	if in.faults > 0 {
		faults = append(faults, fmt.Errorf("%d faults", in.faults))
	}
	for _, grown := range []struct {
		what  string
		each  []int
		slack int
	}{{"memory", in.memory, 16}, {"descriptors", in.files, 50}} {
		part := len(grown.each) / 4 // the first has to warm up
		if early, late := median(grown.each[part:2*part]), median(grown.each[3*part:]); late > early+grown.slack {
			faults = append(faults, fmt.Errorf("%s grew from %d to %d", grown.what, early, late))
		}
	}
	o.served, o.asked = in.pages, in.pages+in.faults
	return o, faults
}

// median returns the one in the middle, 0 if there is none.
func median(all []int) int {
	if len(all) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(all))[len(all)/2]
}

// reload sends SIGHUP after files have changed: a token each time, the users now and then, which
// ends all connections.
func reload(ctx context.Context, a *arena) {
	users, _ := os.ReadFile(filepath.Join(a.dir, "users"))
	for n := 1; ctx.Err() == nil; n++ {
		a.file("token.new", fmt.Sprintln(n))
		os.Rename(filepath.Join(a.dir, "token.new"), filepath.Join(a.dir, "token"))
		if n%10 == 0 {
			a.file("users.new", fmt.Sprintf("# %d\n%s", n, users))
			os.Rename(filepath.Join(a.dir, "users.new"), filepath.Join(a.dir, "users"))
		}
		a.program.Process.Signal(syscall.SIGHUP)
		sleep(ctx, 2*time.Second)
	}
}

// readAs reads and checks pages as one kind of scraper, half of them of some sources only.
func (in *integrity) readAs(ctx context.Context, a *arena, i int) {
	kind := kinds[i%len(kinds)]
	c := newClient(a, 0)
	c.http.Transport.(*http.Transport).DisableCompression = !kind.zipped
	var read []*reading
	for {
		sleep(ctx, rand.N(time.Second))
		over := ctx.Err() != nil
		for len(read) > 0 && (over || time.Since(read[0].began) > 2*timeout) { // what was under way is told by now
			in.note(read[0], "", read[0].checkAges())
			read = read[1:]
		}
		if over {
			return
		}
		found := &reading{kind: kind.name, accept: kind.accept, asked: in.streams, path: "/metrics"}
		if rand.IntN(4) > 0 {
			found.asked = slices.DeleteFunc(slices.Clone(in.streams), func(*stream) bool { return rand.IntN(2) == 0 })
			found.path += "?exporter_name=reverse_exporter"
			for _, s := range found.asked {
				found.path += "&exporter_name=" + s.name
			}
		}
		in.mu.Lock()
		scrapes := in.scrapes
		in.mu.Unlock()
		found.began = time.Now()
		page, err := c.scrape(context.WithoutCancel(ctx), found.path, kind.accept)
		if err == nil {
			err = found.check(page)
		}
		// If all results are kept, another's page may serve.
		fresh := slices.ContainsFunc(found.asked, func(s *stream) bool { return s.kept == 0 })
		if err == nil && fresh && found.scrapes < scrapes {
			err = fmt.Errorf("stale: %d scrapes are counted, there were %d before", found.scrapes, scrapes)
		}
		if err != nil {
			in.note(found, page, err)
		} else {
			read = append(read, found)
			in.mu.Lock()
			in.scrapes = max(in.scrapes, found.scrapes)
			in.mu.Unlock()
		}
	}
}

// note counts a page, which is without fault or not.
func (in *integrity) note(found *reading, page string, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if err == nil {
		in.pages, in.samples, in.joined = in.pages+1, in.samples+found.samples, in.joined+found.joined
		in.lag = max(in.lag, found.lag)
		return
	}
	in.faults++
	fmt.Printf("FAULT: %s, %s, asked at %s: %v\n", found.kind, found.path, found.began.Format("15:04:05.000"), err)
	os.WriteFile(filepath.Join(os.TempDir(), fmt.Sprintf("attack-fault-%d", in.faults%20)), []byte(page), 0o600)
}

// reading is a page and what was found of it.
type reading struct {
	kind    string // of scraper
	accept  string
	path    string
	asked   []*stream
	began   time.Time
	parts   map[string]*part // by name of the stream
	samples int
	joined  int
	scrapes int // that it counts
	lag     time.Duration
}

// part is how far the lines of one stream on a page were read.
type part struct {
	lines      int
	generation string
}

const scrapesTotal = `reverse_exporter_scrapes_total{exporter_name="reverse_exporter",code="200"} `

// check compares a page with the generations that its first samples name.
func (re *reading) check(page string) error {
	open := strings.HasSuffix(page, "\n# EOF\n")
	wantOpen := strings.Contains(re.accept, "openmetrics") &&
		slices.ContainsFunc(re.asked, func(s *stream) bool { return s.open })
	if open != wantOpen || !strings.HasSuffix(page, "\n") || strings.Count(page, "# EOF") > 1 {
		return fmt.Errorf("the end of the page is %q, OpenMetrics %v", page[max(0, len(page)-20):], wantOpen)
	}
	re.parts = map[string]*part{}
	streams := map[string]*stream{}
	for _, s := range re.asked {
		re.parts[s.name], streams[s.name] = &part{}, s
		if !isUp(page, s.name) {
			_, status, _ := strings.Cut(page, "\nreverse_exporter_source_failures_total{exporter_name=\""+s.name)
			return fmt.Errorf("%s is down: %.1000s", s.name, status)
		}
	}
	typeOfShared := ""
	for line := range strings.Lines(page) {
		line = line[:len(line)-1]
		if line[0] == '#' {
			if rest, ok := strings.CutPrefix(line, "# TYPE shared "); ok {
				typeOfShared += rest
			}
			continue
		}
		if count, ok := strings.CutPrefix(line, scrapesTotal); ok {
			re.scrapes, _ = strconv.Atoi(count)
		}
		if kind, _, _ := strings.Cut(line, "_"); kind == "reverse" || kind == "go" || kind == "process" {
			continue
		}
		_, rest, _ := strings.Cut(line, `{exporter_name="`)
		name, _, _ := strings.Cut(rest, `"`)
		s, p := streams[name], re.parts[name]
		if s == nil {
			return fmt.Errorf("%q is of nobody who was asked", line)
		}
		if _, value, _ := strings.Cut(line, "} "); p.lines == 0 {
			p.generation, _, _ = strings.Cut(value, " ")
		}
		if want := s.line(p.lines, p.generation, open); line != want {
			return fmt.Errorf("line %d of %s is %q, want %q", p.lines, name, line, want)
		}
		p.lines++
		re.samples++
	}
	shared := map[string]bool{}
	for name, p := range re.parts {
		if want := streams[name].lines(); p.lines != want {
			return fmt.Errorf("%s has %d samples, want %d", name, p.lines, want)
		}
		if streams[name].shares {
			n, _ := strconv.Atoi(p.generation)
			shared[streams[name].typeOfShared(n)] = true
		}
	}
	want := ""
	switch {
	case len(shared) > 1 && open:
		want = "unknown"
	case len(shared) > 1:
		want = "untyped"
	}
	for one := range shared {
		if len(shared) == 1 {
			want = one
		}
	}
	if typeOfShared != want {
		return fmt.Errorf("the type of shared is %q, want %q", typeOfShared, want)
	}
	return nil
}

// lines returns how many samples a stream has.
func (s *stream) lines() int {
	if s.shares {
		return s.size + sharedSize
	}
	return s.size
}

// line returns a sample of a stream as the page has it.
func (s *stream) line(i int, generation string, open bool) string {
	if i >= s.size {
		return `shared{exporter_name="` + s.name + `",i="` + strconv.Itoa(i-s.size) + `"} ` + generation
	}
	line := s.metric() + `{exporter_name="` + s.name + `",i="` + strconv.Itoa(i) +
		`",of="everything that is measured"} ` + generation
	if s.open && open {
		line += ` # {generation="` + generation + `"} ` + generation
	}
	return line
}

// slack is how long the program may take to read a body that is written, on a busy machine.
const slack = 2 * time.Second

// checkAges checks that no generation is of a run that had ended before the scrape was sent. When the
// next run of the form had begun, it had. Otherwise it has ended soon after its body; but a file does
// not tell when it is read.
func (re *reading) checkAges() error {
	for _, s := range re.asked {
		n, err := strconv.Atoi(re.parts[s.name].generation)
		g, next, ok := s.get(n)
		replaced, ended := time.Duration(0), re.began.Sub(g.ended)
		if !next.IsZero() {
			replaced = re.began.Sub(next)
		}
		switch {
		case err != nil || !ok || g.ended.IsZero():
			return fmt.Errorf("%s has no generation %d", s.name, n)
		case s.isFile && replaced > slack:
			return fmt.Errorf("stale: generation %d of %s was replaced %v before the scrape", n, s.name, replaced)
		case s.isFile:
			continue
		case replaced > 0:
			return fmt.Errorf("stale: the run of %s after generation %d began %v before the scrape",
				s.name, n, replaced)
		case ended > s.kept+slack:
			return fmt.Errorf("stale: generation %d of %s ended %v before the scrape", n, s.name, ended)
		case s.kept == 0 && g.began.Before(re.began):
			re.joined++
			re.lag = max(re.lag, ended)
		}
	}
	return nil
}
