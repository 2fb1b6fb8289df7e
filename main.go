// Reverse_exporter turns an appliance with several Prometheus exporters, .prom files and
// scripts inside into one scrape target.
//
// The way of the data:
//
//	flags -> []source -> fetch (all at once, each behind its waterfall) -> parse and label -> merge -> write
//
// The four files, each of one idea, with their sections:
//
//	main.go   flags in, HTTP out: Usage; Running; Options; Listening; Who may ask; A scrape;
//	          The overview page; Small modes
//	exec.go   a source into a result: Sources; The waterfall; Taking turns; Files that flags name;
//	          Reading a body; Exporters; Files; Commands; Counts
//	merge.go  results into a page that scrapers share: Merging; Conflicts; Repeats; Findings; Writing;
//	          Text as protobuf; Status metrics; Sharing pages
//	parse.go  one body into an exposition: Lines; The parser; Metadata; Samples; Values; Protobuf;
//	          Bytes and predicates; Labelling; One exposition
//
// A new flag is a row of options, in Usage; how values are set is in Options. A new kind of source is such a row,
// a case of newSource, a fetcher, and a row of reasons.
package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path"
	"runtime"
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

// ---- Usage

// version is set by the linker. Without it, the build's own information has the version.
var version = ""

// readBuild returns what the build's own information says: the version and the revision.
func readBuild() (string, string) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	revision := "unknown"
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			revision = s.Value
		}
	}
	// Without a tag the build's own version may be (devel); of a tree with changes it ends with +dirty.
	return cmp.Or(version, strings.Trim(info.Main.Version, "()"), "unknown"), revision
}

const introduction = `reverse_exporter turns many Prometheus exporters, .prom files and scripts into
one scrape target: one port, one /metrics, and the label exporter_name.

Examples:
  reverse_exporter --http node=http://localhost:9100 --http pg=http://pg:9187
  reverse_exporter --file cron='/var/lib/metrics/*.prom' --exec up='up -a'
  reverse_exporter --exec smart='smart.sh {disk=sda|sdb}' --max-age smart:5m
  reverse_exporter --once --http node=http://localhost:9100/metrics
  CMD ["/reverse_exporter", "--http", "app=http://localhost:8080/metrics"]
      (in a Dockerfile, where nothing expands $VAR)
`

// options returns the table of all flags, in the order of the help. They set what they are for in c or s.
func options(c *config, s *sourceConfig) []option {
	return []option{
		{help: "Sources, repeatable; NAME becomes the value of exporter_name:"},
		{"http", "NAME=URL", "an exporter: http://, https:// or http://unix:/run/x.sock:/metrics; " +
			"without a path it is /metrics", func(url string) error { _, _, err := parseURL(url); return err }, ""},
		{"file", "NAME=PATTERN", "text files, read on every scrape; PATTERN may be a glob", checkPattern, ""},
		{"exec", "NAME=COMMAND", "a command that prints metrics, run on demand without a shell; " +
			"{x}, {x=default}, {x=one|other} take the URL parameter x",
			func(line string) error { _, err := parseCommand(line); return err }, ""},

		{help: "Options; with NAME: for one source, without for all:"},
		{"label", "[NAME:]KEY=VALUE", "add a label to every sample; repeatable", s.setLabel, ""},
		{"timeout", "[NAME:]DURATION", "longest time of a fetch (10s)", asDuration(&s.timeout, time.Millisecond), ""},
		{"max-bytes", "[NAME:]SIZE", "largest body taken, as 512KiB, 32MiB (32MiB)", s.setMaxBytes, ""},
		{"max-age", "[NAME:]DURATION", "serve a result again while it is younger (0)", asDuration(&s.maxAge, 0), ""},
		{"interval", "NAME:DURATION", "fetch in the background", asDuration(&s.interval, 100*time.Millisecond), ""},
		{"parallel", "NAME:N", "runs of a command with different arguments at once (1)", s.setParallel, "exec"},
		{"drop", "[NAME:]PATTERN", "leave out the metric families that match, as go_*; repeatable", s.setDrop, ""},
		{"path", "[NAME:]/PATH", "endpoint to be served on; repeatable (/metrics)", s.setPath, ""},
		{"params", "NAME:LIST", "URL parameters forwarded to an http source, * for all",
			func(list string) error { s.params = strings.Split(list, ","); return nil }, "http"},
		{"header", "NAME:'KEY: VALUE'", "send a header to an http source; repeatable; " +
			"NAME:@FILE reads header lines from a file", s.setHeader, "http"},
		{"bearer-token-file", "NAME:FILE", "send its text as Authorization: Bearer", asText(&s.tokenFile), "http"},
		{"ca-file", "NAME:FILE", "certificates that an https source is verified against", asText(&s.caFile), "https"},
		{"cert-file", "NAME:FILE", "certificate that an https source is shown ...", asText(&s.certFile), "https"},
		{"key-file", "NAME:FILE", "... and its key, if that is in another file", asText(&s.keyFile), "https"},
		{"server-name", "NAME:HOST", "name in the certificate of an https source", asText(&s.serverName), "https"},
		{"insecure", nameList, "do not verify the certificates of these", asSwitch(&s.insecure), "https"},
		{"raw", nameList, "do not add exporter_name", asSwitch(&s.raw), ""},
		{"any-exit", nameList, "take what these print whatever their exit status", asSwitch(&s.anyExit), "exec"},
		{"require", nameList, "answer 503 when one of these is down", asSwitch(&s.require), ""},

		{help: "Server:"},
		{"web.listen-address", "ADDR", ":9998, 127.0.0.1:9998, unix:/run/re.sock; repeatable (:9998); " +
			"http:// or https:// before it chooses TLS for this one", c.setListen, ""},
		{"web.tls-cert-file", "FILE", "serve https with this certificate ...", asText(&c.tlsCert), ""},
		{"web.tls-key-file", "FILE", "... and its key", asText(&c.tlsKey), ""},
		{"web.tls-client-ca-file", "FILE", "demand client certificates of this CA", asText(&c.tlsClientCA), ""},
		{"web.basic-auth-file", "FILE", "demand a password; has lines of user:HASH", asText(&c.basicAuth), ""},
		{"web.disable-exporter-metrics", "", "leave out the program's own process_* and go_* metrics", nil, ""},
		{"log.level", "LEVEL", "debug, info, warn or error (info)",
			asText(&c.logLevel, "debug", "info", "warn", "error"), ""},
		{"log.format", "FORMAT", "logfmt or json (logfmt)", asText(&c.logFormat, "logfmt", "json"), ""},

		{help: "Modes:"},
		{"once", "", "print the merged metrics and exit; 1 if a source is down", nil, ""},
		{"check", "", "validate flags and files, print what was understood and what looks like a mistake", nil, ""},
		{"healthcheck", "", "ask the program at the first --web.listen-address; exit 0 if it is well", nil, ""},
		{"hash-password", "", "read a password from standard input and print its HASH", nil, ""},
		{"version", "", "print the version and exit", nil, ""},
		{"help", "", "print this and exit", nil, ""},

		{help: "Exit status: 0 if all is well or a signal ended it, 1 if not, 64: wrong flags.\n" +
			"More: README.md in the repository of the Go module reverse_exporter."},
	}
}

// appendUsage appends the help text, in lines of 80 columns at most.
func appendUsage(dst []byte) []byte {
	dst = append(dst, introduction...)
	for _, o := range options(&config{}, &sourceConfig{}) {
		if o.name == "" {
			dst = append(append(append(dst, '\n'), o.help...), '\n')
			continue
		}
		line := fmt.Sprintf("%-32s", "  --"+o.name+" "+o.value)
		for word := range strings.FieldsSeq(o.help) {
			if len(line)+1+len(word) > 80 {
				dst = append(append(dst, line...), '\n')
				line = strings.Repeat(" ", 32)
			}
			line += " " + word
		}
		dst = append(append(dst, line...), '\n')
	}
	return dst
}

// main is the only one to touch the arguments, signals and the exit status.
func main() {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP) // before all else: until then, one ends the program
	// The stop function is never called: after it, a second signal would kill the program before it could
	// return its exit status.
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	// Without this, SIGPIPE kills the program at the first log line after whoever reads standard error has gone.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	os.Exit(run(ctx, hangup, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// ---- Running

// usageStatus is the exit status when the flags are wrong, EX_USAGE of sysexits.h: a service
// manager must not restart the program then, and can tell it from a crash of Go, which ends with 2.
const usageStatus = 64

// run is the program. It returns the exit status: 0, 1 if something went wrong, or usageStatus.
func run(ctx context.Context, hangup <-chan os.Signal, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	log.SetOutput(io.Discard) // net/http writes there what an exporter sends after its answer
	c, faults := parseFlags(args[1:])
	var mode func(stdout io.Writer) int
	switch {
	case len(faults) > 0:
		return complain(stderr, usageStatus, faults...)
	case c.modes["help"]:
		mode = func(stdout io.Writer) int { stdout.Write(appendUsage(nil)); return 0 }
	case c.modes["version"]:
		mode = func(stdout io.Writer) int {
			version, revision := readBuild()
			fmt.Fprintf(stdout, "reverse_exporter %s, revision %s, %s, %s/%s\n",
				version, revision, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return 0
		}
	case c.modes["hash-password"]:
		mode = func(stdout io.Writer) int { return hashPassword(stdin, stdout, stderr) }
	case c.modes["healthcheck"]:
		mode = func(stdout io.Writer) int {
			a := c.listen[0]
			if err := a.checkHealth(4 * time.Second); err != nil { // Docker waits 5 s, and would show nothing of this
				return complain(stderr, 1, fmt.Sprintf("no healthy program at %s: %v; "+
					"give --healthcheck the same --web.* flags as the program", a.addr, err))
			}
			fmt.Fprintln(stdout, "healthy")
			return 0
		}
	case os.Getpid() == 1 && slices.ContainsFunc(c.sources, func(s *sourceConfig) bool { return s.kind == "exec" }):
		path, _ := os.Executable() // "" if there is no /proc
		return supervise(ctx, cmp.Or(path, args[0]), args, stderr)
	default:
		return c.run(ctx, hangup, stdout, stderr)
	}
	return printing(ctx, stdout, stderr, mode)
}

// run does what needs the sources: it checks them, asks them once, or serves them.
func (c *config) run(ctx context.Context, hangup <-chan os.Signal, stdout, stderr io.Writer) int {
	life, end := context.WithCancel(context.Background())
	lines := newLogWriter(stderr)
	p := newProgram(life, c, lines)
	p.dropped = &lines.dropped
	defer func() {
		end()
		within(time.Second, func() { // without end, if a command hangs in the kernel
			for _, s := range p.sources {
				s.drain()
			}
		})
		within(time.Second, lines.flush)
	}()
	status := printing(ctx, stdout, lines, func(stdout io.Writer) int {
		if c.modes["check"] {
			return p.check(stdout)
		}
		if len(c.doubts) > 0 {
			p.log.Info("some flags may not be meant like this", "doubts", strings.Join(c.doubts, "; "))
		}
		if err := p.loadFiles(); err != nil {
			return complain(lines, 1, strings.Split(err.Error(), "\n")...)
		}
		if c.modes["once"] {
			return p.once(stdout)
		}
		return 0
	})
	switch {
	case c.modes["check"], c.modes["once"]:
		return status
	case ctx.Err() != nil:
		return 0 // as later, in serve
	case status != 0:
		return status
	}
	listeners, err := p.listenAll()
	if err != nil {
		return complain(lines, 1, err.Error())
	}
	return p.serve(ctx, hangup, listeners)
}

// complain prints what is wrong, and returns the exit status.
func complain(stderr io.Writer, status int, faults ...string) int {
	for _, fault := range faults {
		fmt.Fprintln(stderr, "reverse_exporter:", fault)
	}
	return status
}

// printing returns what do returns, or 1 if what it printed could not be written.
func printing(ctx context.Context, stdout, stderr io.Writer, do func(stdout io.Writer) int) int {
	return unlessDone(ctx, 1, func() int {
		out := bufio.NewWriter(stdout)
		status := do(out)
		if err := out.Flush(); err != nil {
			return complain(stderr, 1, fmt.Sprintf("failed to print: %v", err))
		}
		return status
	})
}

// unlessDone returns what do returns, or instead once ctx is done: a wait for a pipe or a disk cannot be cancelled.
func unlessDone(ctx context.Context, instead int, do func() int) int {
	code := make(chan int, 1)
	go func() { code <- do() }()
	select {
	case <-ctx.Done():
		return instead
	case code := <-code:
		return code
	}
}

// within waits until do is done, but no longer than d.
func within(d time.Duration, do func()) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	unlessDone(ctx, 0, func() int { do(); return 0 })
}

// program is what runs.
type program struct {
	*config
	shared
	version     string               // of the build
	revision    string               // of the build
	sources     []*source            // in the order of the flags
	endpoints   map[string][]*source // by path
	started     time.Time
	pages       pages
	connections connections
	refusals    atomic.Uint64      // requests without a right password or certificate
	scrapes     [600]atomic.Uint64 // answers, by status code
	lastScrape  atomic.Pointer[scraped]
	found       sync.Map // by path: the *findings of its last page
	tls         tlsFiles
	passwords   passwords
	dropped     *atomic.Uint64 // lines of the log that could not be written

	stopping context.Context // done when scrapes are to be answered with what has arrived
	stop     context.CancelFunc

	keptMu   sync.Mutex // guards the next two; held while the page at / is made, by one at a time
	kept     string     // the page at /, with marks
	keptMade time.Time
	process  atomic.Pointer[processMetrics]
	loggedMu sync.Mutex     // guards logged
	logged   map[string]int // see logOnce
}

// newProgram builds the running program from valid flags. Its fetches end when life does.
func newProgram(life context.Context, c *config, stderr io.Writer) *program {
	p := &program{config: c, endpoints: map[string][]*source{}, logged: map[string]int{}, dropped: new(atomic.Uint64),
		started: time.Now(), connections: connections{all: map[net.Conn]*connection{}, room: maxConnections()}}
	p.pages.freed = make(chan struct{}, 1)
	p.pages.chunks.New = func() any { return new(chunk) }
	p.stopping, p.stop = context.WithCancel(context.Background())
	p.version, p.revision = readBuild()
	p.userAgent = fmt.Sprintf("%s/%s (%.8s)", ownName, p.version, rand.Text()) // of no other one, see ServeHTTP
	var level slog.Level
	level.UnmarshalText([]byte(c.logLevel))
	o := &slog.HandlerOptions{Level: level}
	p.log = slog.New(slog.NewTextHandler(stderr, o))
	if c.logFormat == "json" {
		p.log = slog.New(slog.NewJSONHandler(stderr, o))
	}
	for _, sc := range c.sources {
		s := newSource(life, sc, &p.shared)
		p.sources = append(p.sources, s)
		for _, path := range s.paths {
			p.endpoints[path] = append(p.endpoints[path], s)
		}
	}
	p.watch(p.tls.setCert, func() {}, flagFile{flag: "--web.tls-cert-file", name: c.tlsCert},
		flagFile{flag: "--web.tls-key-file", name: c.tlsKey})
	p.watch(p.tls.setCAs, p.connections.end, flagFile{flag: "--web.tls-client-ca-file", name: c.tlsClientCA})
	p.passwords.key, p.passwords.turn.most = []byte(rand.Text()), 16
	p.watch(p.passwords.set, p.connections.end, flagFile{flag: "--web.basic-auth-file", name: c.basicAuth})
	return p
}

// logWriter writes the log in a goroutine of its own. So a log that nobody reads, or whose
// disk is full, holds nothing up: what cannot be written is dropped and counted.
type logWriter struct {
	writes  chan func()
	log     io.Writer
	dropped atomic.Uint64 // lines
}

// newLogWriter returns a log writer that keeps up to 256 lines in memory.
func newLogWriter(log io.Writer) *logWriter {
	l := &logWriter{writes: make(chan func(), 256), log: log}
	go func() {
		for write := range l.writes {
			write()
		}
	}()
	return l
}

// Write takes a line. It never blocks and never fails.
func (l *logWriter) Write(line []byte) (int, error) {
	kept := slices.Clone(line)
	write := func() {
		if _, err := l.log.Write(kept); err != nil {
			l.dropped.Add(1)
		}
	}
	select {
	case l.writes <- write:
	default:
		l.dropped.Add(1)
	}
	return len(line), nil
}

// flush waits until all lines are written: without end, if nobody reads the log.
func (l *logWriter) flush() {
	written := make(chan struct{})
	l.writes <- func() { close(written) }
	<-written
}

// loadFiles reads the files that flags name. Its error has a line for each that is wrong.
func (p *program) loadFiles() error {
	var faults []error
	for _, w := range p.watched {
		faults = append(faults, w.load())
	}
	return errors.Join(faults...)
}

// serve answers until ctx is done, then lets running scrapes end.
func (p *program) serve(ctx context.Context, hangup <-chan os.Signal, listeners []net.Listener) int {
	server := p.newServer()
	failed := make(chan error, len(listeners))
	p.log.Info("starting reverse_exporter", "version", p.version, "revision", p.revision,
		"sources", len(p.sources), "endpoints", strings.Join(slices.Sorted(maps.Keys(p.endpoints)), " "))
	for i, l := range listeners {
		p.log.Info("listening", "address", l.Addr().String(), "tls", p.listen[i].tls)
		go func() { failed <- server.Serve(l) }()
	}
	for _, s := range p.sources {
		if s.interval > 0 {
			go s.repeat(ctx)
		}
	}
	go p.follow(ctx, hangup)
	code, why := 0, "a signal"
	select {
	case err := <-failed:
		p.log.Error("failed to serve", "err", err)
		code, why = 1, "a failure"
	case <-ctx.Done():
	}
	p.log.Info("stopping", "why", why, "ran", time.Since(p.started).Round(time.Second))
	defer time.AfterFunc(1500*time.Millisecond, p.stop).Stop()
	grace, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	if server.Shutdown(grace) != nil {
		server.Close()
	}
	return code
}

// follow looks at the files that flags name every 5 s and at SIGHUP, so that no request has to
// wait for a disk. At SIGHUP and every five minutes the exporters' addresses are followed, too.
func (p *program) follow(ctx context.Context, hangup <-chan os.Signal) {
	look, reconnect := time.Tick(5*time.Second), time.Tick(5*time.Minute)
	for {
		followed, again := p.sources, false
		select {
		case <-ctx.Done():
			return
		case <-look:
			followed = nil
		case <-reconnect:
		case <-hangup:
			again = true
			p.log.Info("SIGHUP: the files that flags name are read anew; changed flags want a restart")
		}
		for _, s := range followed {
			if e, ok := s.fetcher.(*exporter); ok {
				e.reconnect()
			}
		}
		for _, w := range p.watched {
			go w.refresh(again) // in a goroutine of its own, for its disk may hang
		}
	}
}

// supervise runs the program once more as a child, and returns its exit status. It does what PID 1 has to do: it
// forwards signals and reaps every orphan. So the child's wait for a command never races with the reaping.
func supervise(ctx context.Context, path string, args []string, stderr io.Writer) int {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT,
		syscall.SIGUSR1, syscall.SIGUSR2)
	child, err := syscall.ForkExec(path, args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	if err != nil {
		return complain(stderr, 1, fmt.Sprintf("failed to start %s again, to reap processes as PID 1: %v", path, err))
	}
	// A signal that came before Notify ended ctx instead.
	defer context.AfterFunc(ctx, func() { syscall.Kill(child, syscall.SIGTERM) })()
	go func() {
		for s := range signals {
			syscall.Kill(child, s.(syscall.Signal))
		}
	}()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return complain(stderr, 1, fmt.Sprintf("failed to wait as PID 1: %v", err))
		case pid == child && status.Exited():
			return status.ExitStatus()
		case pid == child && status.Signaled():
			return 128 + int(status.Signal())
		}
	}
}

// ---- Options

// config is what the flags say: plain data, of which newProgram makes what runs.
type config struct {
	modes     map[string]bool // those given, by flag
	sources   []*sourceConfig // in the order of the flags
	doubts    []string        // what may not be meant
	listen    []address
	logLevel  string
	logFormat string

	tlsCert, tlsKey, tlsClientCA, basicAuth string // files, "" for none
}

// option is one flag, or without a name a heading of the help.
type option struct {
	name string
	// value stands for its value in the help, and tells whom the flag is for: NAME=WHAT makes a
	// source, [NAME:]VALUE is for one or for all, NAME:VALUE for one, nameList for those listed;
	// VALUE is for the server, and a flag without a value is a mode.
	value string
	help  string // says repeatable if the flag can be given again with another value
	set   func(value string) error
	only  string // kind of source that has it, or https for http with TLS; "" for all
}

// nameList is the value of an option that only says which sources have it.
const nameList = "NAME,..."

// secret reports whether the value is not repeated in an error.
func (o option) secret() bool { return o.name == "header" }

// makesSource reports whether the flag is --http, --file or --exec.
func (o option) makesSource() bool { return strings.HasPrefix(o.value, "NAME=") }

// flags gathers what stands on the command line, and every fault in it.
type flags struct {
	config
	options []option                 // for no source in particular
	named   map[string]*sourceConfig // the sources by name
	given   map[string][]string      // values by flag
	number  int                      // of sources given, good or bad
	faults  []string
}

// parseFlags turns a command line into what it says, and all that is wrong in it. A fault
// names the flag and the source but no value that may be secret.
func parseFlags(args []string) (*config, []string) {
	f := &flags{named: map[string]*sourceConfig{}, given: map[string][]string{}}
	f.config = config{modes: map[string]bool{}, logLevel: "info", logFormat: "logfmt"}
	f.options = options(&f.config, &sourceConfig{})
	f.readArgs(args)
	if f.modes["help"] || f.modes["version"] {
		return &f.config, nil
	}
	f.setOptions()
	f.checkSources()
	f.checkServer()
	if !f.modes["healthcheck"] && !f.modes["hash-password"] && len(f.sources) == 0 && len(f.faults) == 0 {
		f.fault(`there is no source. For example:
  reverse_exporter --http node=http://localhost:9100/metrics
  reverse_exporter --file backup='/var/lib/metrics/*.prom' --exec certs=/usr/local/bin/certs`)
		if os.Getenv("MERGER_URLS") != "" {
			f.fault("MERGER_URLS is not read: write --http NAME=URL for each of its URLs")
		}
	}
	return &f.config, f.faults
}

// fault keeps what is wrong.
func (f *flags) fault(format string, args ...any) {
	f.faults = append(f.faults, fmt.Sprintf(format, args...))
}

// readArgs reads the command line, and goes on after each fault. It makes the sources; the other
// options can name them in any order, so their values are only gathered.
func (f *flags) readArgs(args []string) {
	var last *option // the flag before, nil if there is no such flag
	for i := 0; i < len(args); i++ {
		name, isFlag := strings.CutPrefix(args[i], "-")
		name, value, hasValue := strings.Cut(strings.TrimPrefix(name, "-"), "=")
		if name == "h" {
			name = "help"
		}
		var o *option
		if i := slices.IndexFunc(f.options, func(o option) bool { return o.name == name && name != "" }); i >= 0 {
			o = &f.options[i]
		}
		if isFlag && o != nil && o.value != "" && !hasValue && i+1 < len(args) {
			i++
			value, hasValue = args[i], true
		}
		switch {
		case f.modes["hash-password"] && o == nil, name == "hash-password" && hasValue: // it may be the password
			f.fault("--hash-password takes no argument: it reads the password from standard input")
			return
		case !isFlag:
			f.stray(i, args[i], last)
			continue
		case o == nil && strings.ContainsAny(name, " ,:"): // it may hold a secret
			f.fault("argument %d is not a flag; a flag and its value are two arguments, or --flag=value", i+1)
		case o == nil:
			typed, _, _ := strings.Cut(args[i], "=")
			f.unknown(typed, name)
			if !hasValue && i+1 < len(args) && !strings.HasPrefix(args[i+1], "-") {
				i++ // its value
			}
		case o.value == "" && hasValue:
			f.fault("--%s takes no value", name)
		case o.value == "":
			f.modes[name] = true
		case !hasValue:
			f.fault("--%s needs a value: --%s %s", name, name, o.value)
		case o.makesSource():
			f.addSource(o, value)
		case o.value == nameList:
			f.given[name] = append(f.given[name], strings.Split(value, ",")...)
		default:
			f.given[name] = append(f.given[name], value)
		}
		last = o
	}
}

// stray keeps the fault of a word that belongs to no flag, with the one before it. The word is
// shown unless it may be a piece of something secret.
func (f *flags) stray(i int, arg string, before *option) {
	word, wrong := "", "is not a flag; a value with blanks needs quotes"
	_, missing := os.Lstat(arg)
	switch {
	case arg == "":
		wrong = "is empty: is a variable not set?"
	case arg == "/bin/sh":
		wrong = `is a shell: is the CMD JSON, with double quotes, as ["--http", "…"]?`
	case path.Base(arg) == ownName:
		wrong = "is the name of the program: in a container, its entrypoint may be there already"
	case arg == "help" || arg == "version":
		wrong = "is not a flag: write --" + arg
	case strings.HasPrefix(arg, "–") || strings.HasPrefix(arg, "—"):
		wrong = "begins with a long dash: write --"
	case before == nil:
	case before.secret() || before.makesSource() && (before.name != "file" || missing != nil):
		word = ", after --" + before.name + ","
	default:
		word = " (" + arg + "), after --" + before.name + ","
		if missing == nil {
			wrong = "is a file: a glob needs quotes, or the shell expands it"
		}
	}
	f.fault("argument %d%s %s", i+1, word, wrong)
}

// foreign are flags that other exporters have, with a dot between words, and what serves instead.
var foreign = map[string]string{
	"web.telemetry.path":           "use --path /PATH",
	"web.config.file":              "use --web.tls-cert-file, --web.tls-key-file and --web.basic-auth-file",
	"collector.textfile.directory": "use --file NAME='DIR/*.prom'",
	"config.file":                  "there is no configuration file, only flags",
	"config":                       "there is no configuration file, only flags",
	"listen":                       "use --web.listen-address",
	"listen.address":               "use --web.listen-address",
	"listen.port":                  "use --web.listen-address :9998",
	"port":                         "use --web.listen-address :9998",
	"v":                            "use --version, or --log.level debug",
	"verbose":                      "use --log.level debug",
	"debug":                        "use --log.level debug",
	"url":                          "use --http NAME=URL",
}

// unknown keeps the fault of a flag that does not exist, as it was typed, with the one that was meant.
func (f *flags) unknown(typed, name string) {
	nearest := slices.MinFunc(f.options, func(a, b option) int {
		return cmp.Compare(distance(name, a.name), distance(name, b.name))
	}).name
	instead := foreign[strings.NewReplacer("-", ".", "_", ".").Replace(name)]
	if instead == "" && distance(name, nearest) < min(3, len(name)) { // two typing errors at most
		instead = "did you mean --" + nearest + "?"
	}
	f.fault("there is no flag %s; %s", typed, cmp.Or(instead, "see --help"))
}

// distance returns how many letters are left of the longer name without what both begin and end with.
func distance(a, b string) int {
	for a != "" && b != "" && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for a != "" && b != "" && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return max(len(a), len(b))
}

// addSource adds the source of an --http, --file or --exec flag.
func (f *flags) addSource(o *option, value string) {
	f.number++
	name, target, ok := strings.Cut(value, "=")
	wrong := ""
	switch {
	case strings.HasPrefix(value, `"`) || strings.HasPrefix(value, "'"):
		wrong = "it begins with a quote, which nothing removes in a JSON CMD: want " + o.value
	case strings.HasPrefix(value, "http://") || strings.HasPrefix(value, "https://"):
		wrong = "the name is missing: want " + o.value
	case ok && strings.Contains(name, " "):
		wrong = "the name holds a blank"
	case !ok || !isSourceName(name):
		wrong = "want " + o.value + ", with a NAME of letters, digits, _ . and -, first a letter or digit"
	}
	switch {
	case wrong != "":
		f.fault("--%s, source %d: %s", o.name, f.number, wrong)
		return
	case f.named[name] != nil:
		f.fault("--%s %s: another source has this name", o.name, name)
		return
	case name == ownName:
		f.fault("--%s %s: this name is the program's own", o.name, name)
	}
	s := &sourceConfig{kind: o.name, name: name, target: target, timeout: 10 * time.Second, maxBytes: 32 << 20}
	f.sources = append(f.sources, s)
	f.named[name] = s
	if err := o.set(target); err != nil {
		f.fault("--%s %s: %v", o.name, name, err) // without the target, which may hold a secret
	}
}

// isSourceName reports whether a source may have the name.
func isSourceName(name string) bool {
	odd := func(c rune) bool { return c >= utf8.RuneSelf || class[c]&labelByte == 0 && c != '.' && c != '-' }
	return name != "" && !strings.ContainsAny(name[:1], "_.-") && !strings.ContainsFunc(name, odd)
}

// setOptions sets the options of the server, then of each source, whose own values override the general ones.
func (f *flags) setOptions() {
	values := map[string]map[*sourceConfig][]string{} // by option
	for _, o := range f.options {
		values[o.name] = f.values(o)
		for _, value := range values[o.name][nil] { // its fault is told once, whatever the number of sources
			if err := o.set(value); err != nil {
				f.fault("%s: %v", o.shown(nil, value), err)
			}
		}
	}
	for _, s := range f.sources {
		for _, o := range options(&config{}, s) {
			own := values[o.name][s]
			for _, value := range values[o.name][nil] {
				if o.name != "path" || own == nil { // its own paths replace these
					o.set(value)
				}
			}
			for _, value := range own {
				if err := cmp.Or(s.lacks(o), o.set(value)); err != nil {
					f.fault("%s: %v", o.shown(s, value), err)
				}
			}
		}
		if s.paths == nil {
			s.paths = []string{"/metrics"}
		}
	}
}

// lacks returns an error if no source of this kind has the option.
func (s *sourceConfig) lacks(o option) error {
	isHTTPS := s.kind == "http" && strings.HasPrefix(s.target, "https://")
	if o.only == "" || o.only == s.kind || o.only == "https" && isHTTPS {
		return nil
	}
	return fmt.Errorf("only %s sources have this", o.only)
}

// shown returns an option as it is written on the command line, for a source or for all, without secrets.
func (o option) shown(s *sourceConfig, value string) string {
	switch {
	case s != nil && (o.value == nameList || o.secret()):
		value = s.name
	case s != nil:
		value = s.name + ":" + value
	}
	return "--" + o.name + " " + value
}

// values returns the values of an option by source, with nil for all or the server. Repeating one changes nothing.
func (f *flags) values(o option) map[*sourceConfig][]string {
	values := map[*sourceConfig][]string{}
	for _, given := range f.given[o.name] {
		s, value, ok := f.split(o, given)
		for _, doubt := range unexpanded(value, strings.Contains(o.value, "FILE")) {
			f.doubts = append(f.doubts, o.shown(s, value)+": "+doubt)
		}
		same := func(earlier string) bool { return earlier == value || !strings.Contains(o.help, "repeatable") }
		if key, _, isLabel := strings.Cut(value, "="); isLabel && o.name == "label" { // one value for each key
			same = func(earlier string) bool { return strings.HasPrefix(earlier, key+"=") }
		}
		switch i := slices.IndexFunc(values[s], same); {
		case !ok:
		case i < 0:
			values[s] = append(values[s], value)
		case values[s][i] != value:
			f.fault("%s: given twice, with different values", o.shown(s, value))
		}
	}
	return values
}

// split returns whom a value is for, nil for all sources or the server, what it says, and whether that is right.
func (f *flags) split(o option, given string) (s *sourceConfig, value string, ok bool) {
	name, value, hasName := strings.Cut(given, ":")
	if o.value == nameList {
		name, value, hasName = given, "", true
	}
	wrong, afterEquals, equals := strings.Cut(given, "=")
	if o.secret() {
		afterEquals = "…"
	}
	switch s := f.named[name]; {
	case !strings.Contains(o.value, "NAME"):
		return nil, given, true
	case s != nil && hasName:
		return s, value, true
	case o.value == nameList,
		hasName && isSourceName(name) && (o.name != "label" && !o.secret() || strings.ContainsAny(value, "=:@")):
		// in --label env:prod and --header 'X-Scope: a', the NAME is missing
		f.fault("--%s %s: no source has this name; %s", o.name, name, f.names())
	case equals && f.named[wrong] != nil && (o.name != "label" || strings.Contains(afterEquals, "=")):
		// the mistake that everyone makes
		f.fault("--%s %s=: a colon belongs after the name, write --%[1]s %[2]s:%s", o.name, wrong, afterEquals)
	case !strings.HasPrefix(o.value, "["):
		f.fault("--%s: want %s, with the NAME of a source; %s", o.name, o.value, f.names())
	default:
		return nil, given, true
	}
	return nil, "", false
}

// names lists the sources, for an error.
func (f *flags) names() string {
	return "there are: " + cmp.Or(strings.Join(slices.Sorted(maps.Keys(f.named)), ", "), "none")
}

// checkSources finds options that exclude each other.
func (f *flags) checkSources() {
	for _, s := range f.sources {
		line, doubts := &commandLine{}, unexpanded(s.target[strings.LastIndex(s.target, "@")+1:], s.kind == "http")
		if parsed, err := parseCommand(s.target); s.kind == "exec" && err == nil {
			line, doubts = parsed, parsed.doubts()
		}
		if s.interval > 0 && (s.params != nil || len(line.params) > 0) {
			f.fault("--interval %s: not together with --params or a placeholder", s.name)
		}
		if s.keyFile != "" && s.certFile == "" {
			f.fault("--key-file %s: needs --cert-file %s:FILE", s.name, s.name)
		}
		if s.logins() > 1 {
			f.fault("--http %s: only one of a user in the URL, --bearer-token-file, --header Authorization", s.name)
		}
		for _, doubt := range doubts {
			f.doubts = append(f.doubts, fmt.Sprintf("--%s %s: %s", s.kind, s.name, doubt))
		}
		needs := line.needs()
		if needs != "" && f.modes["once"] {
			f.fault("--exec %s: {%s} has no default, and --once cannot give it a value", s.name, needs)
		}
		isBeside := func(other *sourceConfig) bool {
			served := func(path string) bool { return slices.Contains(other.paths, path) }
			return other != s && slices.ContainsFunc(s.paths, served)
		}
		if needs != "" && slices.ContainsFunc(f.sources, isBeside) {
			f.fault("--exec %s: {%s} has no default, it needs its own --path, as --path %[1]s:/%[1]s", s.name, needs)
		}
	}
}

// logins counts how often the flags say how to log in to an exporter.
func (s *sourceConfig) logins() (n int) {
	if s.tokenFile != "" {
		n++
	}
	if u, _, err := parseURL(s.target); err == nil && u.User != nil {
		n++
	}
	for _, line := range s.headers {
		if key, _, _ := parseHeader(line); key == "Authorization" {
			n++
		}
	}
	return n
}

// checkServer decides which listeners have TLS, and finds options that do not go together.
func (f *flags) checkServer() {
	if len(f.listen) == 0 {
		f.listen = []address{{network: "tcp", addr: ":9998"}}
	}
	for i, a := range f.listen {
		f.listen[i].tls = a.scheme == "https" || a.scheme == "" && f.tlsCert != ""
	}
	anyTLS := slices.ContainsFunc(f.listen, func(a address) bool { return a.tls })
	switch {
	case f.modes["healthcheck"] || f.modes["hash-password"]: // they read no files
	case (f.tlsCert == "") != (f.tlsKey == ""):
		f.fault("--web.tls-cert-file and --web.tls-key-file: give both; they may name one file that holds both")
	case anyTLS && f.tlsCert == "":
		f.fault("--web.listen-address: https:// needs --web.tls-cert-file and --web.tls-key-file")
	case f.tlsCert != "" && !anyTLS:
		f.fault("--web.tls-cert-file: every --web.listen-address begins with http://, so it would not be used")
	case f.tlsClientCA != "" && f.tlsCert == "":
		f.fault("--web.tls-client-ca-file: needs --web.tls-cert-file and --web.tls-key-file")
	}
}

// setLabel adds a label, KEY=VALUE.
func (s *sourceConfig) setLabel(label string) error {
	key, value, ok := strings.Cut(label, "=")
	switch {
	case !ok && strings.Contains(label, ":"):
		return fmt.Errorf("want KEY=VALUE: write %s", strings.Replace(label, ":", "=", 1))
	case !ok || !isBareLabel([]byte(key)):
		return errors.New("want KEY=VALUE, with a KEY of letters, digits and _ that does not begin with a digit")
	case key == "exporter_name" || key == "le" || key == "quantile" || strings.HasPrefix(key, "__"):
		return fmt.Errorf("the label name %s is reserved", key)
	case value == "" || !utf8.ValidString(value):
		return errors.New("want a VALUE, in UTF-8")
	case s.labels == nil:
		s.labels = map[string]string{}
	}
	s.labels[key] = value
	return nil
}

// setParallel sets how many runs of a command may go on at once.
func (s *sourceConfig) setParallel(value string) error {
	n, err := strconv.ParseUint(value, 10, 16)
	if err != nil || n == 0 {
		return errors.New("want a whole number of at least 1")
	}
	s.parallel = int(n)
	return nil
}

// setDrop adds a glob for the names of metric families that are left out.
func (s *sourceConfig) setDrop(value string) error {
	glob, err := goGlob(value)
	if strings.ContainsAny(strings.ReplaceAll(value, "[^", "["), "^$(|)") {
		return errors.New("want a glob like go_*, not a regular expression")
	}
	if value == "" || strings.ContainsAny(value, `{}"=, `) {
		return errors.New("want one glob like go_* for the names of metric families (labels cannot be dropped)")
	}
	s.drop = append(s.drop, glob)
	return err
}

// setPath adds the path of an endpoint.
func (s *sourceConfig) setPath(name string) error {
	switch {
	case !strings.HasPrefix(name, "/"):
		return errors.New("a path begins with /")
	case name == "/", name == "/-", strings.HasPrefix(name, "/-/"):
		return errors.New("this path is the program's own")
	case path.Clean(name) != name, (&url.URL{Path: name}).EscapedPath() != name:
		return errors.New(`a path has plain characters, no ? # % or \, no . or .. between slashes, no / at its end`)
	}
	s.paths = append(s.paths, name)
	return nil
}

// setHeader adds a header, or with @ a file of headers.
func (s *sourceConfig) setHeader(value string) error {
	if file, ok := strings.CutPrefix(value, "@"); ok {
		s.headerFiles = append(s.headerFiles, file)
		return nil
	}
	s.headers = append(s.headers, value)
	_, _, err := parseHeader(value)
	return err
}

// asSwitch returns what sets an option that has no value of its own.
func asSwitch(to *bool) func(string) error {
	return func(string) error { *to = true; return nil }
}

// asText returns what sets a text: one of the words, or any but none.
func asText(to *string, words ...string) func(string) error {
	return func(value string) error {
		*to = value
		switch {
		case value == "":
			return errors.New("want a value")
		case words != nil && !slices.Contains(words, value):
			return fmt.Errorf("want one of %s", strings.Join(words, ", "))
		}
		return nil
	}
}

// asDuration returns what sets a duration of at least least, written as in Go or with d for a day.
func asDuration(to *time.Duration, least time.Duration) func(string) error {
	return func(text string) error {
		days, rest, hasDays := strings.Cut(text, "d")
		switch {
		case !hasDays:
			days, rest = "0", text
		case rest == "":
			rest = "0s"
		}
		n, err := strconv.ParseFloat(days, 64)
		part, err2 := time.ParseDuration(rest)
		_, noUnit := strconv.ParseUint(text, 10, 64)
		total := n*float64(24*time.Hour) + float64(part)
		switch {
		case noUnit == nil && text != "0":
			return fmt.Errorf("the unit is missing: write %ss for seconds", text)
		case err != nil || err2 != nil || !(n >= 0 && part >= 0 && total <= float64(366*24*time.Hour)):
			return errors.New("want a duration like 500ms, 10s, 5m, 1h30m or 2d, of a year at most")
		case total < float64(least):
			return fmt.Errorf("must be at least %v", least)
		}
		*to = time.Duration(total)
		return nil
	}
}

// setMaxBytes sets a size, a whole number with its unit.
func (s *sourceConfig) setMaxBytes(text string) error {
	number := strings.TrimRight(text, "KMGiB")
	unit := map[string]uint64{"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[text[len(number):]]
	n, err := strconv.ParseUint(number, 10, 31)
	switch {
	case unit == 0 || err != nil || n == 0:
		return errors.New("want a whole number with B, KiB, MiB or GiB, like 32MiB")
	case n > 1<<30/unit:
		return errors.New("must be at most 1GiB")
	}
	s.maxBytes = int64(n * unit)
	return nil
}

// setListen adds an address to listen on.
func (c *config) setListen(text string) error {
	scheme, addr, hasScheme := strings.Cut(text, "://")
	if !hasScheme {
		scheme, addr = "", text
	}
	a := address{scheme: scheme, network: "tcp", addr: addr}
	file, isUnix := strings.CutPrefix(addr, "unix:")
	host, port, err := net.SplitHostPort(addr)
	_, path, hasPath := strings.Cut(addr, "/")
	switch {
	case hasScheme && scheme != "http" && scheme != "https":
		return fmt.Errorf("%s:// is not known; only http:// and https:// may stand before the address", scheme)
	case isUnix && (file == "" || file[0] == '@'):
		return errors.New("want a path, like unix:/run/re.sock")
	case len(file) > maxSocketPath && isUnix:
		return fmt.Errorf("the path of a socket may have %d bytes, this one has %d", maxSocketPath, len(file))
	case isUnix:
		a.network, a.addr = "unix", file
	case strings.HasPrefix(addr, "/"):
		return fmt.Errorf("a socket is written unix:%s", addr)
	case isPort(strings.Trim(addr, "*:")) && addr != ":"+port:
		return fmt.Errorf("a port of every address is written :%s", strings.Trim(addr, "*:"))
	case hasPath:
		return fmt.Errorf("an address has no path: leave out /%s (--path sets where the metrics are)", path)
	case err != nil:
		return errors.New("want an address like :9998, 127.0.0.1:9998, [::1]:9998 or unix:/run/re.sock")
	case !isPort(port):
		return fmt.Errorf("the port %s is not a number from 0 to 65535", port)
	case host == "0.0.0.0": // by "tcp" it would be IPv6 as well
		a.network = "tcp4"
	}
	c.listen = append(c.listen, a)
	return nil
}

// ---- Listening

// address is where the program listens.
type address struct {
	scheme        string // http, https, or "" for what the other flags say
	network, addr string
	tls           bool
}

// listenAll opens all listeners, or none.
func (p *program) listenAll() ([]net.Listener, error) {
	var listeners []net.Listener
	for _, a := range p.listen {
		l, err := a.listen()
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			if errors.Is(err, syscall.EADDRINUSE) && a.checkHealth(time.Second) == nil {
				err = fmt.Errorf("%w, most likely by another reverse_exporter", err)
			}
			return nil, fmt.Errorf("failed to listen, see --web.listen-address: %w", err)
		}
		if a.tls {
			l = tls.NewListener(l, &tls.Config{GetConfigForClient: p.tlsConfig})
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// listen opens a listener. A Unix socket is for all who may enter its folder, and replaces one left behind.
func (a address) listen() (net.Listener, error) {
	if a.network == "unix" {
		conn, err := net.DialTimeout("unix", a.addr, time.Second)
		switch info, missing := os.Lstat(a.addr); {
		case err == nil:
			conn.Close()
			return nil, fmt.Errorf("another program listens on %s", a.addr)
		case missing != nil: // or Listen will fail, too
		case info.Mode().Type() != os.ModeSocket:
			return nil, fmt.Errorf("%s exists and is not a socket", a.addr)
		case errors.Is(err, syscall.ECONNREFUSED):
			if err := os.Remove(a.addr); err != nil {
				return nil, err
			}
		}
	}
	l, err := net.Listen(a.network, a.addr)
	if own, isSocket := l.(*net.UnixListener); isSocket {
		info, missing := os.Lstat(a.addr)
		l = socket{own, info}
		if err = cmp.Or(missing, os.Chmod(a.addr, 0o666)); err != nil {
			l.Close()
		}
	}
	return l, err
}

// socket is a listener at a path, which is removed at the end unless another program has bound it.
type socket struct {
	*net.UnixListener
	info os.FileInfo
}

func (s socket) Close() error {
	now, err := os.Lstat(s.Addr().String())
	s.SetUnlinkOnClose(err == nil && os.SameFile(now, s.info))
	return s.UnixListener.Close()
}

// tlsConfig returns what a handshake is done with. A client without a certificate may
// connect, so that it can be told what is missing.
func (p *program) tlsConfig(*tls.ClientHelloInfo) (*tls.Config, error) {
	c := &tls.Config{
		Certificates: []tls.Certificate{*p.tls.cert.Load()},
		ClientCAs:    p.tls.cas.Load(),
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"http/1.1"}, // one request at a time: connections are what is counted
	}
	if c.ClientCAs != nil {
		c.ClientAuth = tls.VerifyClientCertIfGiven
	}
	return c, nil
}

// newServer returns the server of all listeners, which speaks HTTP/1 only: see tlsConfig.
func (p *program) newServer() *http.Server {
	return &http.Server{
		Handler:                      p,
		DisableGeneralOptionsHandler: true, // it would answer without a password
		ReadHeaderTimeout:            10 * time.Second,
		WriteTimeout:                 10 * time.Second, // send renews it
		IdleTimeout:                  5 * time.Minute,
		MaxHeaderBytes:               8 << 10,
		ErrorLog:                     slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		ConnState: func(conn net.Conn, state http.ConnState) {
			if p.connections.changed(conn, state) {
				p.logOnce(slog.LevelWarn, 1000, "", "too many connections: for each new one, one of the client that "+
					"has most is closed", "room", p.connections.room)
			}
		},
	}
}

// connections are those of the clients, for which there is room: see maxConnections.
type connections struct {
	mu   sync.Mutex // guards all
	room int
	all  map[net.Conn]*connection
}

// clientOf returns what a client is known by: its IP address, of which an IPv6 network of
// 64 bits has one. All clients of Unix sockets are one.
func clientOf(remoteAddr string) string {
	addr, err := netip.ParseAddrPort(remoteAddr)
	if err != nil {
		return ""
	}
	ip := addr.Addr().Unmap()
	if ip.Is4() {
		return ip.String()
	}
	network, _ := ip.Prefix(64)
	return network.String()
}

// connection is what is known of a connection.
type connection struct {
	client string // see clientOf
	state  http.ConnState
	since  time.Time
	ending bool // it is closed once it has its answer
}

// changed follows the state of a connection. It reports whether another one was closed in favour of it.
func (cs *connections) changed(conn net.Conn, state http.ConnState) (full bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c := cs.all[conn]
	switch {
	case state == http.StateNew:
		c = &connection{client: clientOf(conn.RemoteAddr().String()), since: time.Now()}
		if full = len(cs.all) >= cs.room; full {
			cs.evict(c.client)
		}
		cs.all[conn] = c
	case c == nil: // it was closed to make room
	case state == http.StateClosed:
		delete(cs.all, conn)
	case c.ending && state == http.StateIdle:
		cs.close(conn)
	default:
		c.state, c.since = state, time.Now()
	}
	return full
}

// end closes all connections, as who may ask has changed. Answers that are under way end first.
func (cs *connections) end() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for conn, c := range cs.all {
		c.ending = true
		if c.state != http.StateActive {
			cs.close(conn)
		}
	}
}

// evict closes a connection in favour of a new one of the client: of the client that has most, one that has not been
// served for a second, or else one that is idle, that has been served for a second, whose request is not here yet,
// or any; of these the oldest. The caller holds mu.
func (cs *connections) evict(client string) {
	held := map[string]int{client: 1}
	for _, c := range cs.all {
		held[c.client]++
	}
	rank := func(c *connection) int {
		long, served := time.Since(c.since) >= time.Second, c.state == http.StateActive
		return slices.Index([]bool{long && !served, c.state == http.StateIdle, long, !served, true}, true)
	}
	cs.close(slices.MinFunc(slices.Collect(maps.Keys(cs.all)), func(a, b net.Conn) int {
		one, other := cs.all[a], cs.all[b]
		return cmp.Or(cmp.Compare(held[other.client], held[one.client]),
			cmp.Compare(rank(one), rank(other)), one.since.Compare(other.since))
	}))
}

// close closes a connection. The caller holds mu.
func (cs *connections) close(conn net.Conn) {
	delete(cs.all, conn)
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn() // tls.Conn's Close writes to the client, which may block
	}
	conn.Close()
}

// ---- Who may ask

// ServeHTTP answers a request.
func (p *program) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer p.recoverPanic()
	if r.ContentLength != 0 { // the body is not read, so the connection cannot be used again
		w.Header().Set("Connection", "close")
		http.NewResponseController(w).SetReadDeadline(time.Now().Add(10 * time.Second))
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	get := r.Method == http.MethodGet || r.Method == http.MethodHead
	sources, isEndpoint := p.endpoints[r.URL.Path]
	switch {
	case get && (r.URL.Path == "/-/healthy" || r.URL.Path == "/-/ready"):
		io.WriteString(w, "OK\n")
	case !p.admits(w, r):
	case r.UserAgent() == p.userAgent:
		p.refuse(w, "the program asks itself: a source has the program's own address", http.StatusLoopDetected)
	case !get:
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD are allowed", http.StatusMethodNotAllowed)
	case isEndpoint:
		p.scrape(w, r, sources)
	case r.URL.Path == "/" && r.Header.Get(timeoutHeader) != "":
		p.refuse(w, "this is the page for people; the metrics are at /metrics, see metrics_path", http.StatusNotFound)
	case r.URL.Path == "/":
		p.index(w, r)
	default:
		p.refuse(w, "there is nothing at this path; / lists the endpoints", http.StatusNotFound)
	}
}

// recoverPanic logs a fault of the program itself, and cuts the answer off.
func (p *program) recoverPanic() {
	v := recover()
	if v != nil && v != http.ErrAbortHandler {
		p.log.Error("a fault in reverse_exporter", "panic", v, "stack", string(debug.Stack()))
	}
	if v != nil {
		panic(http.ErrAbortHandler)
	}
}

// admits reports whether the client may ask. If not, it answers and counts the request.
func (p *program) admits(w http.ResponseWriter, r *http.Request) bool {
	name, password, ok := r.BasicAuth()
	code, why := http.StatusOK, ""
	switch {
	case p.tls.cas.Load() != nil && (r.TLS == nil || len(r.TLS.VerifiedChains) == 0):
		code, why = http.StatusForbidden, "a client certificate is required"
	case p.basicAuth == "":
	case !ok || strings.IndexByte(password, 0) >= 0: // HMAC pads keys with NULs, so more of them would match, too
		code, why = http.StatusUnauthorized, "a user name and password are required"
	default:
		code = p.passwords.check(r.Context(), clientOf(r.RemoteAddr), name, password)
		why = "the user name or password is wrong"
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(10 * time.Second)) // from now on
	}
	if r.Context().Err() != nil { // it has left
		panic(http.ErrAbortHandler)
	}
	switch code {
	case http.StatusOK:
		return true
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", `Basic realm="reverse_exporter", charset="UTF-8"`)
	case http.StatusServiceUnavailable:
		why = "too many passwords are being checked"
	}
	p.refusals.Add(1)
	client := cmp.Or(clientOf(r.RemoteAddr), "a Unix socket")
	p.logOnce(slog.LevelWarn, 100, client+why, "requests are refused", "client", client, "why", why)
	http.Error(w, why, code)
	return false
}

// passwords are those that --web.basic-auth-file demands. Stretching one takes about a
// quarter of a second. So one is stretched at a time, and one found right is remembered.
type passwords struct {
	users atomic.Pointer[map[string]*user] // by name
	right sync.Map                         // digests of passwords that were found right, each for its user's key
	key   []byte                           // of digests
	turn  turn                             // to stretch
	left  sync.Map                         // clients that have left, one of whose checks goes on
}

// user is one user's password, stretched.
type user struct {
	iterations int
	salt, key  []byte
}

// set keeps the users of a password file.
func (ps *passwords) set(files []flagFile) error {
	us := map[string]*user{}
	err := eachLine(files[0].text, func(line string) error {
		name, hash, _ := strings.Cut(line, ":")
		u, err := parseHash(hash)
		if err == nil && (name == "" || us[name] != nil) {
			err = errors.New("the user has no name, or the name of an earlier one")
		}
		us[name] = u
		return err
	})
	if err == nil && len(us) == 0 {
		err = errors.New("it holds no user")
	}
	if err != nil {
		return files[0].fault(err)
	}
	ps.users.Store(&us)
	return nil
}

// parseHash parses pbkdf2-sha256$ITERATIONS$SALT$KEY.
func parseHash(hash string) (*user, error) {
	parts := strings.Split(hash, "$")
	if len(parts) != 4 || parts[0] != "pbkdf2-sha256" {
		return nil, errors.New("want user:HASH (bcrypt is not supported); " +
			`make a line by: echo "user:$(printf %s "$PASSWORD" | reverse_exporter --hash-password)"`)
	}
	iterations, err1 := strconv.Atoi(parts[1])
	salt, err2 := base64.RawStdEncoding.DecodeString(parts[2])
	key, err3 := base64.RawStdEncoding.DecodeString(parts[3])
	switch {
	case cmp.Or(err1, err2, err3) != nil || len(salt) < 8 || len(key) != sha256.Size:
		return nil, errors.New("the HASH is damaged")
	case iterations < minIterations || iterations > maxIterations:
		return nil, fmt.Errorf("the HASH has %d iterations; want %d to %d", iterations, minIterations, maxIterations)
	}
	return &user{iterations, salt, key}, nil
}

// Iterations that a hash may have: with fewer, guessing is too cheap; more take too long on a small device.
const minIterations, maxIterations = 100_000, 2_000_000

// check returns 200 for the right password, 401 for a wrong one, or 503 if too many wait to be checked, or for
// nobody to see once ctx is done. An unknown user costs as much as a known one. When a client leaves, one check
// of it goes on, so that its next try finds it done.
func (ps *passwords) check(ctx context.Context, client, name, password string) int {
	us := *ps.users.Load()
	u, known := us[name]
	if !known {
		names := slices.Sorted(maps.Keys(us))
		u = us[names[int(ps.digest(name)[0])%len(names)]] // always the same
	}
	digest := ps.digest(string(u.key) + password)
	foundRight := func() bool {
		_, found := ps.right.Load(digest)
		return found && known
	}
	if foundRight() {
		return http.StatusOK
	}
	own, cancel := context.WithCancel(context.WithoutCancel(ctx))
	const gone = 0
	code := unlessDone(ctx, gone, func() int {
		defer cancel()
		if ps.turn.wait(own, client) != nil {
			return http.StatusServiceUnavailable
		}
		defer ps.turn.pass()
		if foundRight() { // by another request meanwhile
			return http.StatusOK
		}
		if key := stretch(password, u.salt, u.iterations); !hmac.Equal(key, u.key) || !known {
			return http.StatusUnauthorized
		}
		ps.right.Store(digest, true)
		return http.StatusOK
	})
	if code != gone {
		return code
	}
	_, another := ps.left.LoadOrStore(client, nil)
	if !another {
		context.AfterFunc(own, func() { ps.left.Delete(client) })
	}
	if another || ps.turn.length() > 2000 {
		cancel()
	}
	return http.StatusServiceUnavailable
}

// digest returns a digest that is of use to this run of the program only.
func (ps *passwords) digest(text string) string {
	mac := hmac.New(sha256.New, ps.key)
	io.WriteString(mac, text)
	return string(mac.Sum(nil))
}

// stretch makes a key of a password; that it is slow makes guessing slow.
func stretch(password string, salt []byte, iterations int) []byte {
	key, err := pbkdf2.Key(sha256.New, password, salt, iterations, sha256.Size)
	if err != nil {
		panic(err) // only for key lengths out of range
	}
	return key
}

// ---- A scrape

// scrape answers with the metrics of an endpoint, on which are all these sources.
func (p *program) scrape(w http.ResponseWriter, r *http.Request, all []*source) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		p.refuse(w, "the query string is malformed: "+err.Error(), http.StatusBadRequest)
		return
	}
	want := &pageRequest{client: clientOf(r.RemoteAddr), came: time.Now(), sources: all,
		takes: accepted(r.Header.Values("Accept")), gzip: acceptsGzip(r.Header.Values("Accept-Encoding"))}
	if names, ok := query["exporter_name"]; ok {
		want.sources = selected(all, names)
	}
	if want.sources == nil {
		p.refuse(w, "no source of this endpoint has this exporter_name; / lists them, "+
			"and it can be given more than once", http.StatusNotFound)
		return
	}
	for name := range query {
		if name != "exporter_name" && !slices.ContainsFunc(all, func(s *source) bool { return s.takes(name) }) {
			name = name[:min(len(name), 64)]
			p.logOnce(slog.LevelInfo, 20, name, "no source takes this parameter", "path", r.URL.Path, "parameter", name)
		}
	}
	timeout := p.scrapeTimeout(want.sources, r.Header.Get(timeoutHeader))
	want.tickets, err = askAll(want.sources, query, want.takes, time.Now().Add(timeout-margin(timeout)))
	if err != nil {
		p.refuse(w, err.Error(), http.StatusBadRequest)
		return
	}
	began := time.Now()
	sp, err := p.openPage(r.Context(), want, timeout)
	if err != nil && r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has left; nothing would look like an empty page
	}
	if len(want.sources) == len(all) || r.Header.Get(timeoutHeader) != "" { // not by hand
		this := &scraped{by: want.client, end: time.Now(), took: time.Since(began)}
		if last := p.lastScrape.Load(); last != nil {
			this.gaps[0] = this.end.Sub(last.end)
			copy(this.gaps[1:], last.gaps[:])
		}
		p.lastScrape.Store(this)
	}
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(10 * time.Second)) // from now on
	if err != nil {
		p.refuse(w, "no page could be made before the deadline of the scrape", http.StatusServiceUnavailable)
		return
	}
	found := sp.findings // what is kept holds no page
	if len(want.sources) == len(all) {
		p.found.Store(r.URL.Path, found)
	}
	p.send(w, r, want, sp)
	p.logFindings(found)
}

// openPage waits for what the sources have for a scrape, then for a page of it. It fails just before the timeout of
// the scrape, so that the scraper still sees why.
func (p *program) openPage(ctx context.Context, want *pageRequest, timeout time.Duration) (*sharedPage, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout-margin(timeout)/4)
	defer cancel()
	waiting, stopWaiting := context.WithTimeout(ctx, timeout-margin(timeout))
	defer stopWaiting()
	defer context.AfterFunc(p.stopping, stopWaiting)()
	for _, t := range want.tickets {
		t.wait(waiting)
	}
	expired := waiting.Err() == context.DeadlineExceeded
	for _, t := range want.tickets {
		defer t.leave(expired)
	}
	if err := ctx.Err(); err != nil { // or one that has gone could take a turn
		return nil, err
	}
	want.program, want.process = p.about(), p.processNow()
	return p.pages.open(ctx, want)
}

// scraped is what the page at / says of a scrape.
type scraped struct {
	by   string // see clientOf
	end  time.Time
	took time.Duration
	gaps [5]time.Duration // between the last scrapes
}

// selected returns the sources with the names, in their own order. It returns nil if one of the names is unknown,
// and an empty slice that is not nil if only the program itself is named.
func selected(sources []*source, names []string) []*source {
	for _, name := range names {
		if name != ownName && !slices.ContainsFunc(sources, func(s *source) bool { return s.name == name }) {
			return nil
		}
	}
	return slices.DeleteFunc(slices.Clone(sources), func(s *source) bool { return !slices.Contains(names, s.name) })
}

// scrapeTimeout returns how long a scrape may take until its answer begins. If the scraper announces
// no deadline, there is time for a run that is under way and for one more.
func (p *program) scrapeTimeout(sources []*source, header string) time.Duration {
	longest := time.Second // to render the program's own metrics, if they are all
	if len(sources) > 0 {
		longest = slices.MaxFunc(sources, func(a, b *source) int { return cmp.Compare(a.timeout, b.timeout) }).timeout
	}
	seconds, err := strconv.ParseFloat(header, 64)
	if err != nil || !(seconds > 0) || math.IsInf(seconds, 1) {
		return 2*longest + time.Second // more than the margin
	}
	d := time.Duration(min(seconds, 1e6) * float64(time.Second))
	if longest > d {
		p.logOnce(slog.LevelWarn, 1000, "", "a --timeout is longer than the deadline that a scraper announces, "+
			"so that a slow source may miss it", "timeout", longest, "deadline", d)
	}
	return d
}

// askAll asks all sources at once, with the arguments that a query has for each. The scrape waits until then.
func askAll(sources []*source, query url.Values, takes accept, until time.Time) ([]*ticket, error) {
	var chosen []arguments
	for _, s := range sources {
		a, err := s.arguments(query, takes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		chosen = append(chosen, a)
	}
	var tickets []*ticket
	for i, s := range sources {
		tickets = append(tickets, s.join(chosen[i], until))
	}
	return tickets, nil
}

// refuse answers a scrape with an error. One that asks for what there is not is logged, as Prometheus shows
// the code only.
func (p *program) refuse(w http.ResponseWriter, fault string, code int) {
	p.scrapes[code].Add(1)
	if code == http.StatusNotFound {
		p.logOnce(slog.LevelInfo, 20, fault, "a request was answered with 404", "why", fault)
	}
	http.Error(w, fault, code)
}

// whyUnavailable says of each source that makes a scrape fail why it is down: those that --require wants up, and
// all if the page would have nothing of what was asked for by name, or of the endpoint's only source.
func (p *program) whyUnavailable(r *http.Request, sources []*source, results []*result) string {
	named := r.URL.Query()["exporter_name"]
	empty := (len(named) > 0 || len(p.endpoints[r.URL.Path]) == 1) && !slices.Contains(named, ownName)
	for _, r := range results {
		empty = empty && r.failure != nil && len(r.bodies) == 0
	}
	var lines []string
	for i, s := range sources {
		if f := results[i].failure; f != nil && (empty || s.require) {
			lines = append(lines, fmt.Sprintf("down: %s: %s: %s", s.name, f.reason, printable(f.String())))
		}
	}
	return strings.Join(lines, "\n")
}

// send writes a page to a scraper, which must read 256 KiB every 10 s, and closes it.
func (p *program) send(w http.ResponseWriter, r *http.Request, want *pageRequest, sp *sharedPage) {
	defer p.pages.close(sp, want.client)
	if down := p.whyUnavailable(r, sp.sources, sp.results); down != "" {
		p.refuse(w, down, http.StatusServiceUnavailable)
		return
	}
	p.scrapes[http.StatusOK].Add(1)
	h := w.Header()
	h.Set("Content-Type", sp.form.contentType())
	h.Set("Vary", "Accept, Accept-Encoding")
	sent := sp.page
	if want.gzip {
		sent = sp.zipped
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("Content-Length", strconv.Itoa(sent.size))
	if r.Method == http.MethodHead {
		return
	}
	control := http.NewResponseController(w)
	uncut := context.AfterFunc(sp.ctx, func() { control.SetWriteDeadline(time.Now()) })
	buf := p.pages.chunks.Get().(*chunk)
	defer p.pages.chunks.Put(buf)
	left := net.Buffers(slices.Clone(sent.chunks)) // it clears what it has read
	var err error
	for i := 0; len(left) > 0 && err == nil; i++ {
		if i%(256<<10/len(buf)) == 0 {
			control.SetWriteDeadline(time.Now().Add(10 * time.Second))
		}
		p.pages.progress(sp)
		if err = sp.ctx.Err(); err == nil { // after the deadline, which the cut may have set before
			n, _ := left.Read(buf[:])
			_, err = w.Write(buf[:n])
		}
	}
	if !uncut() || err != nil {
		p.log.Debug("a scraper was cut off", "err", err)
		panic(http.ErrAbortHandler)
	}
}

// about returns what the status metrics tell of the program.
func (p *program) about() *about {
	a := &about{version: p.version, revision: p.revision, linesLost: p.dropped.Load(),
		scrapes: map[int]uint64{}, reloads: map[string]bool{},
		guarded: p.tls.cas.Load() != nil || p.basicAuth != "", refused: p.refusals.Load()}
	for code := range p.scrapes {
		if n := p.scrapes[code].Load(); n > 0 || code == http.StatusOK || code == http.StatusServiceUnavailable {
			a.scrapes[code] = n
		}
	}
	for _, w := range p.watched {
		a.reloads[w.files[0].flag] = !w.broken.Load()
	}
	if cert := p.tls.cert.Load(); cert != nil {
		a.certExpiry = cert.Leaf.NotAfter
	}
	return a
}

// logFindings logs what could not be merged, once for each pair of sources.
func (p *program) logFindings(found *findings) {
	for pair, c := range found.pairs {
		p.logOnce(slog.LevelWarn, 1000, pair.one+" "+pair.other, string(pair.what), "exporter_name", pair.one,
			"other", pair.other, "families", c.families, "first", c.first[0])
	}
}

// logOnce logs something once for each subject. Beyond most, it tells of the first, tenth, hundredth and so on.
func (p *program) logOnce(level slog.Level, most int, subject, what string, attrs ...any) {
	p.loggedMu.Lock()
	known := p.logged[what+"\n"+subject] > 0
	if !known {
		p.logged[what]++
	}
	others := p.logged[what] - most
	if others <= 0 {
		p.logged[what+"\n"+subject] = 1
	}
	p.loggedMu.Unlock()
	switch {
	case known:
	case others <= 0:
		p.log.Log(context.Background(), level, what, attrs...)
	case strings.Trim(strconv.Itoa(others), "0") == "1":
		p.log.Log(context.Background(), level, what, "others", others)
	}
}

// processMetrics are the metrics of the process, as they were at a time.
type processMetrics struct {
	*exposition
	read time.Time
}

// processNow returns the metrics of the process, at most a second old. It reads files: not to be called during a turn.
func (p *program) processNow() *exposition {
	if p.modes["web.disable-exporter-metrics"] {
		return &exposition{}
	}
	kept := p.process.Load()
	if kept == nil || time.Since(kept.read) >= time.Second {
		now := time.Now() // the clock may have been set since the start; rounded, the start stays the same
		kept = &processMetrics{readProcess(now.Add(-now.Sub(p.started)).Round(100 * time.Millisecond)), now}
		p.process.Store(kept)
	}
	return kept.exposition
}

// acceptsGzip reports whether Accept-Encoding (RFC 9110, 12.5.3) admits gzip at least as gladly as no encoding.
func acceptsGzip(headers []string) bool {
	weights := map[string]float64{}
	eachChoice(headers, func(coding string, _ map[string]string, weight float64) { weights[coding] = weight })
	for _, coding := range []string{"gzip", "x-gzip", "*"} {
		if weight, ok := weights[coding]; ok {
			return weight > 0 && weight >= weights["identity"]
		}
	}
	return false
}

// contentType returns the Content-Type of a page of the form.
func (f form) contentType() string {
	text, escaping := "text/plain; version=0.0.4; charset=utf-8", ""
	if f.quoted {
		text, escaping = "text/plain; version=1.0.0; charset=utf-8", "; escaping=allow-utf-8"
	}
	switch {
	case f.openMetrics:
		text = "application/openmetrics-text; version=1.0.0; charset=utf-8"
	case f.protobuf:
		text = strings.ReplaceAll(protobufMetrics, ";", "; ")
	}
	return text + escaping
}

// accepted reads from Accept what a scraper takes: OpenMetrics where it is named and at least as
// welcome as the text format, protobuf where it is named and at least as welcome as both, and the
// escaping of the most welcome item that names one.
func accepted(headers []string) accept {
	var takes accept
	most := 0.0 // weight of an item with an escaping
	weights := map[string]float64{}
	eachChoice(headers, func(mediaType string, params map[string]string, weight float64) {
		isOpenMetrics := mediaType == "application/openmetrics-text"
		if isOpenMetrics && cmp.Or(params["version"], "1.0.0") != "1.0.0" {
			return
		}
		if mediaType == "application/vnd.google.protobuf" &&
			(params["proto"] != "io.prometheus.client.metricfamily" || params["encoding"] != "delimited") {
			return
		}
		escaping := params["escaping"]
		if (isOpenMetrics || mediaType == "text/plain") && slices.Contains(escapings, escaping) && weight > most {
			takes.escaping, most = escaping, weight
		}
		weights[mediaType] = max(weights[mediaType], weight)
	})
	forText, named := weights["text/plain"]
	if !named {
		forText = max(weights["text/*"], weights["*/*"])
	}
	weight, forProtobuf := weights["application/openmetrics-text"], weights["application/vnd.google.protobuf"]
	takes.protobuf = forProtobuf > 0 && forProtobuf >= max(forText, weight)
	takes.openMetrics = weight > 0 && weight >= forText && !takes.protobuf
	return takes
}

// withoutBlanks removes what may stand around the words of a header.
var withoutBlanks = strings.NewReplacer(" ", "", "\t", "", `"`, "")

// eachChoice calls do for each item of a list of what a scraper accepts, with its parameters
// and its weight, 0 if that is not a number. All is in lower case, without blanks and quotes.
func eachChoice(headers []string, do func(choice string, params map[string]string, weight float64)) {
	list := withoutBlanks.Replace(strings.ToLower(strings.Join(headers, ",")))
	for item := range strings.SplitSeq(list, ",") {
		choice, rest, _ := strings.Cut(item, ";")
		params := map[string]string{"q": "1"}
		for param := range strings.SplitSeq(rest, ";") {
			name, value, _ := strings.Cut(param, "=")
			params[name] = value
		}
		weight, _ := strconv.ParseFloat(params["q"], 64)
		if math.IsNaN(weight) {
			weight = 0
		}
		do(choice, params, min(weight, 1)) // Prometheus 2.49 sends q=2
	}
}

// ---- The overview page

// Marks stand in the page for what differs between those who look at it. No text holds one, see html.
const originMark, refreshMark = "\x00origin", "\x00refresh"

// index answers with the state of every source, for the person on call.
func (p *program) index(w http.ResponseWriter, r *http.Request) {
	sum := sha256.Sum256([]byte(style))
	h := w.Header()
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'sha256-"+
		base64.StdEncoding.EncodeToString(sum[:])+"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	// Without its URL, the refresh of a page that was left at a #link would only scroll there.
	refresh, origin := `<meta http-equiv=refresh content="15;url=./">`, "http://"
	if r.URL.Query().Get("refresh") == "0" {
		refresh = ""
	}
	if r.TLS != nil {
		origin = "https://"
	}
	origin += html(strings.ReplaceAll(cmp.Or(r.Host, "localhost"), "'", "")) // it is shown within '' of a shell
	strings.NewReplacer(originMark, origin, refreshMark, refresh).WriteString(w, p.overview())
}

// overview returns the page at /, with marks. It is made at most once a second, for all who look.
func (p *program) overview() string {
	p.keptMu.Lock()
	defer p.keptMu.Unlock()
	if time.Since(p.keptMade) >= time.Second {
		p.kept, p.keptMade = string(p.appendIndex(nil)), time.Now()
	}
	return p.kept
}

// appendIndex appends the page at /, with marks.
func (p *program) appendIndex(dst []byte) []byte {
	rows, curl := p.rows(), "curl -s"
	if p.basicAuth != "" {
		curl += " -u USER"
	}
	unmerged, leftOut := p.unmerged()
	dst = p.appendBanner(dst, rows, len(unmerged), leftOut)
	dst = p.appendFacts(dst)
	columns := []string{"State", "Source", "From", "Took", "Timeout", "Samples", "Size", "Last success", "Failures"}
	dst = append(dst, "\n<table><thead><tr><th scope=col>"+strings.Join(columns, "<th scope=col>")+"<tbody>"...)
	for _, r := range rows {
		dst = r.appendLine(dst)
		dst = r.appendDetails(dst, curl)
	}
	dst = append(dst, "\n</table>"...)
	if shown := unmerged[:min(len(unmerged), 20)]; len(shown) > 0 {
		dst = fmt.Appendf(dst, "\n<h2 id=-unmerged>Could not be merged as it came (%d of %d)</h2><ul>\n<li>%s\n</ul>",
			len(shown), len(unmerged), strings.Join(shown, "\n<li>"))
	}
	paths := slices.Sorted(maps.Keys(p.endpoints))
	dst = fmt.Appendf(dst, "\n<p class=dim>What Prometheus 3 gets: <code>%s -H 'Accept: %s' '%s%s'</code></main>\n"+
		"<footer><nav aria-label=Endpoints>", curl, prometheus3.header(), originMark, html(paths[0]))
	for _, path := range paths {
		dst = fmt.Appendf(dst, `<a href=".%s">%[1]s</a> `, html(path))
	}
	return fmt.Appendf(dst, `<a href=".%s?exporter_name=%s">status metrics alone</a> `+
		`<a href="./-/healthy">/-/healthy</a></nav></footer>`+"\n", html(paths[0]), ownName)
}

// row is a source as the page shows it.
type row struct {
	*source
	status
	state int // isDown and so on
}

// The states of a source, in the order of the page. The page as a whole can also be in doubt.
const isDown, neverAsked, onDemand, isUp, inDoubt = 0, 1, 2, 3, 4

// looks are what the states are called, the classes that colour them, and what tells them without a colour.
var looks = [...]struct{ name, class, mark string }{
	isDown:     {"down", "down", "✖"},
	neverAsked: {"never asked", "wait", "○"},
	onDemand:   {"on demand", "call", "◇"},
	isUp:       {"up", "up", "●"},
	inDoubt:    {"", "wait", "▲"},
}

// rows returns all sources in the order of their states, then of the flags.
func (p *program) rows() []row {
	var rows []row
	for _, s := range p.sources {
		r := row{s, s.snapshot(), neverAsked}
		switch {
		case r.last.failure != nil:
			r.state = isDown
		case !r.since.IsZero():
			r.state = isUp
		case s.line.needs() != "":
			r.state = onDemand // it cannot be run without a parameter
		}
		rows = append(rows, r)
	}
	slices.SortStableFunc(rows, func(a, b row) int { return cmp.Compare(a.state, b.state) })
	return rows
}

// appendBanner appends the head of the page, and in a line how the host is.
func (p *program) appendBanner(dst []byte, rows []row, unmerged, leftOut int) []byte {
	var n [isUp + 1]int // by state
	for _, r := range rows {
		n[r.state]++
	}
	state, text := isUp, fmt.Sprintf("%d up", n[isUp])
	switch {
	case n[isDown] > 0:
		state, text = isDown, fmt.Sprintf("%d down", n[isDown])
	case n[isUp] == 0:
		state, text = neverAsked, "nothing asked yet"
	case leftOut > 0:
		state, text = inDoubt, grouped(uint64(leftOut))+" samples left out"
	case n[isUp] == len(rows):
		text = "all up"
	}
	last := cmp.Or(p.lastScrape.Load(), &scraped{end: p.started})
	if state != neverAsked && time.Since(last.end) >= max(time.Minute, 3*slices.Max(last.gaps[:])) {
		state = inDoubt
		text = strings.TrimSuffix(fmt.Sprintf("not scraped for %s: the state of %s, %s",
			ageText(last.end), last.end.UTC().Format("15:04"), text), ", all up")
	}
	host, _ := os.Hostname()
	heading := html(looks[state].mark + " " + text + " – " + host)
	dst = fmt.Appendf(dst, "<!doctype html><html lang=en><meta charset=utf-8>"+
		`<meta name=viewport content="width=device-width">%s`+
		"<title>%s</title><style>%s</style>\n<header class=%s><h1>%[2]s</h1>",
		refreshMark, heading, style, looks[state].class)
	dst = appendCauses(dst, rows[:n[isDown]])
	dst = fmt.Appendf(dst, "<p class=dim>%d of %d up, %d on demand, %d never asked",
		n[isUp], len(rows), n[onDemand], n[neverAsked])
	if unmerged > 0 {
		dst = fmt.Appendf(dst, ", <a href=#-unmerged>conflicts: %d</a>", unmerged)
	}
	return append(dst, "</header>\n<main>"...)
}

// appendCauses appends a paragraph for each reason that sources are down for.
func appendCauses(dst []byte, down []row) []byte {
	links := map[string][]string{}
	for _, r := range down {
		reason := r.last.failure.reason
		links[reason] = append(links[reason], fmt.Sprintf("<a href=#%s>%[1]s</a>", r.name))
	}
	for _, reason := range slices.Sorted(maps.Keys(links)) {
		dst = fmt.Appendf(dst, "<p><b>%s: %d</b> %s", reason, len(links[reason]), fewOf(links[reason], 8))
	}
	return dst
}

// appendFacts appends what there is to know of the program itself.
func (p *program) appendFacts(dst []byte) []byte {
	last, scrape := p.lastScrape.Load(), "not scraped yet"
	if last != nil {
		scrape = fmt.Sprintf("last scrape %s by %s, took %s",
			ago(last.end), cmp.Or(last.by, "a Unix socket"), durationText(last.took))
	}
	dst = fmt.Appendf(dst, "\n<p class=dim>reverse_exporter %s (%.7s) · started %s · %s · this page: %s UTC, "+
		`renewed every 15 s: <a href="./">on</a> <a href="?refresh=0">off</a>`,
		html(p.version), html(p.revision), ago(p.started), scrape, clock(time.Now()))
	for _, w := range p.watched {
		if w.broken.Load() {
			dst = fmt.Appendf(dst, "\n<p class=wait>▲ %s: the changed file was not taken up; the log says why",
				html(w.files[0].flag))
		}
	}
	var idle []string
	for glob := range p.idle.Range {
		idle = append(idle, html(glob.(string)))
	}
	if slices.Sort(idle); len(idle) > 0 && last != nil {
		dst = fmt.Appendf(dst, "\n<p class=wait>▲ no metric family has matched --drop %s", strings.Join(idle, ", "))
	}
	return dst
}

// appendLine appends the line of a source: its state and its age, where it is, what its fetches came to.
func (r row) appendLine(dst []byte) []byte {
	look, name, from := looks[r.state], r.name, strings.TrimPrefix(r.kind+" "+r.String(), "http ")
	if r.state != onDemand {
		name = fmt.Sprintf(`<a href=".%s?exporter_name=%s">%[2]s</a>`, html(r.paths[0]), name)
	}
	age, took, timeout, samples, size := "", "–", "–", "–", "–"
	if !r.since.IsZero() {
		age, took = ageText(r.since), durationText(r.last.duration)
		timeout = fmt.Sprintf("<meter aria-label=time max=%.4g high=%.4g value=%.3g></meter> %s", r.timeout.Seconds(),
			0.8*r.timeout.Seconds(), r.last.duration.Seconds(), durationText(r.timeout))
		if r.state != isDown || r.last.samples > 0 {
			samples, size = grouped(uint64(r.last.samples)), fmt.Sprintf("%.1f KiB", float64(r.last.bytes)/(1<<10))
		}
	}
	var failures uint64
	for _, n := range r.failures {
		failures += n
	}
	dst = fmt.Appendf(dst, "\n<tr class=%s id=%s><td>%s <a href=\"?refresh=0#%[2]s\">%[4]s</a> <i>%s</i>",
		look.class, r.name, look.mark, look.name, age)
	return append(dst, "<td>"+strings.Join([]string{name, html(from), took, timeout, samples, size, ago(r.lastSuccess),
		grouped(failures)}, "<td>")...)
}

// appendDetails appends a line with a source's last error and what to do about it, the command that asks
// it now, and its last changes. If it has been well for an hour, only a link to the source shows the line.
func (r row) appendDetails(dst []byte, curl string) []byte {
	f, class := r.lastFailure, looks[r.state].class
	if r.state == isUp && (f == nil || time.Since(r.lastFailureTime) > time.Hour) {
		class += " well"
	}
	dst = fmt.Appendf(dst, "\n<tr class=\"why %s\"><td><td colspan=8>", class)
	if f != nil {
		dst = fmt.Appendf(dst, "<b>%s:</b> %s <i>(failed %s)", f.reason, html(f.err.Error()), ago(r.lastFailureTime))
		if f.hint != "" && r.state == isDown {
			dst = fmt.Appendf(dst, " → %s", html(f.hint))
		}
		dst = append(dst, "</i><br>"...)
	}
	dst = fmt.Appendf(dst, "<code>%s '%s%s?exporter_name=%s", curl, originMark, html(r.paths[0]), r.name)
	if r.state == onDemand {
		dst = fmt.Appendf(dst, "&amp;%s=VALUE", r.line.needs())
	}
	dst = append(dst, "'</code>"...)
	for _, c := range r.changes[:flapping] {
		if !c.at.IsZero() {
			word, _, _ := strings.Cut(c.state, " ")
			dst = fmt.Appendf(dst, " <i>%s %s</i>", clock(c.at), word)
		}
	}
	return dst
}

// unmerged lists, in HTML, what could not be merged as it came when each endpoint was last
// scraped, and counts the samples that the page of one leaves out.
func (p *program) unmerged() (lines []string, leftOut int) {
	for _, found := range p.found.Range {
		samples := 0
		for _, n := range found.(*findings).repeated {
			samples += n
		}
		leftOut = max(leftOut, samples)
		for pair, c := range found.(*findings).pairs {
			families := strings.Join(c.first, ", ")
			if more := c.families - len(c.first); more > 0 {
				families += " and " + grouped(uint64(more)) + " more"
			}
			sources := strings.Join(slices.Compact([]string{pair.one, pair.other}), ", ")
			lines = append(lines, html(fmt.Sprintf("%s: %s: %s", sources, families, pair.what)))
		}
	}
	slices.Sort(lines)
	return slices.Compact(lines), leftOut
}

// html returns text as it stands in HTML.
func html(text string) string {
	return escapeHTML.Replace(strings.Map(func(r rune) rune {
		if unicode.IsGraphic(r) || r == '\n' {
			return r
		}
		return utf8.RuneError
	}, text))
}

// escapeHTML escapes what is special in HTML.
var escapeHTML = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;", "'", "&#39;")

// style is the look of the page at /. On a phone a source is a line, and its cells are shown where they are news.
const style = `
:root{color-scheme:light dark;--fg:#1a1d21;--dim:#5b6470;--bg:#fff;--line:#e1e5e9;--link:#0b57d0}
.down{--c:#b3152f;--t:#fdecef}.wait{--c:#8a6100;--t:#fbf3df}.call{--c:var(--dim)}.up{--c:#197a3d;--t:#e8f5ec}
@media(prefers-color-scheme:dark){:root{--fg:#e6e8eb;--dim:#9aa4b0;--bg:#14171a;--line:#2c3238;--link:#8ab4f8}
.down{--c:#ff8589;--t:#35171c}.wait{--c:#e0b34a;--t:#2e2612}.up{--c:#4cc38a;--t:#12291d}}
body{margin:0 auto;max-width:84em;padding:1em;background:var(--bg);color:var(--fg);
font:15px/1.45 system-ui,sans-serif;font-variant-numeric:tabular-nums}
a{color:var(--link)}.dim,i{color:var(--dim);font-style:normal}p{margin:.6em 0 1em}
i+i{margin-left:.8em}code{font-size:.87em;margin-right:.8em;user-select:all;white-space:normal;overflow-wrap:anywhere}
h1{margin:0;font-size:1.4em;color:var(--c)}h2{margin:1.6em 0 .3em;font-size:1em}ul{margin:0;padding-left:1.2em}
header{display:flex;flex-wrap:wrap;gap:.2em 1.4em;align-items:baseline;padding:.6em 1em;border-radius:6px;
background:var(--t)}header p{margin:0}header b,p.wait{color:var(--c)}footer{margin-top:2em}
table{border-collapse:collapse;width:100%;margin-bottom:1.6em}th{position:sticky;top:0;background:var(--bg);
color:var(--dim);font-weight:500;text-align:left;box-shadow:inset 0 -1px var(--line)}
th,td{padding:.35em 1.2em .35em 0;vertical-align:baseline;white-space:nowrap}td{border-top:1px solid var(--line)}
footer a{margin-right:1.2em}tr{scroll-margin-top:2.5em}:target,:target+.why{background:var(--t)}
:is(th,td):is(:nth-child(4),:nth-child(n+6)){text-align:right}:is(th,td):last-child{padding-right:0}
td:first-child{color:var(--c);font-weight:600}td:first-child a{color:inherit}td i{font-weight:400}
td:nth-child(2) a{color:inherit;font-weight:600}td a{text-decoration-color:var(--dim)}
td:nth-child(3){width:99%;max-width:0;overflow:hidden;text-overflow:ellipsis}
td:nth-child(3):hover,.down td:nth-child(3),.why td{white-space:normal;overflow-wrap:anywhere}
td:nth-child(3),td:nth-child(5){color:var(--dim)}meter{width:5em;height:.8em;vertical-align:baseline}
.why td{border:0;padding-top:0;text-align:left}.why.down b{color:var(--c)}.well:not(:target+tr){display:none}
@media(max-width:66em){:is(th,td):is(:nth-child(5),:nth-child(7)){display:none}}
@media(max-width:54em){thead,td,td code{display:none}table,tbody{display:block}
tr{display:flex;flex-wrap:wrap;gap:0 .8em;border-top:1px solid var(--line);padding:.4em 0}td{border:0;padding:0}
td:first-child{min-width:6.6em}td:nth-child(2){flex:1;overflow:hidden;text-overflow:ellipsis}
td:nth-child(-n+2),.up td:nth-child(4),.down td:nth-child(3),.down td:nth-child(8){display:block}
.down td:nth-child(2){flex:1 0 60%}.down td:nth-child(3){flex:1 0 50%;max-width:none}
.down td:nth-child(8):before{content:"last up: "}.why{border:0;padding-top:0}.why td:first-child{display:none}}}
`

// durationText writes a duration in seconds or milliseconds, a small number with one decimal if it has one.
func durationText(d time.Duration) string {
	n, unit := d.Seconds(), " s"
	if d < 999500*time.Microsecond {
		n, unit = max(0.1, float64(d)/1e6), " ms"
	}
	if n < 9.95 {
		return strings.TrimSuffix(strconv.FormatFloat(n, 'f', 1, 64), ".0") + unit
	}
	return strconv.FormatFloat(n, 'f', 0, 64) + unit
}

// grouped formats a number with thin spaces between groups of three digits.
func grouped(n uint64) string {
	if n < 1000 {
		return strconv.FormatUint(n, 10)
	}
	return fmt.Sprintf("%s\u202f%03d", grouped(n/1000), n%1000)
}

// ago says when a time was, and how long ago.
func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return clock(t) + ", " + ageText(t) + " ago"
}

// clock says when a time was, with its day if it was more than a day ago.
func clock(t time.Time) string {
	if time.Since(t) < 24*time.Hour {
		return t.UTC().Format("15:04:05")
	}
	return t.UTC().Format("2 Jan 15:04:05")
}

// ageText says how long it is since a time.
func ageText(t time.Time) string {
	switch d := time.Since(t); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d d", int(time.Since(t).Hours()/24))
}

// ---- Small modes

// check prints what was understood and what may not be meant, and looks at the files that flags name.
func (p *program) check(stdout io.Writer) int {
	faults := []error{p.loadFiles()}
	if err := p.tls.checkExpiry(); err != nil {
		faults = append(faults, fmt.Errorf("--web.tls-cert-file: %w", err))
	}
	for _, s := range p.sources {
		params := ""
		for _, p := range s.line.params {
			params += " {" + p.name + "}"
		}
		fmt.Fprintf(stdout, "%s %s: %s%s, at %s, timeout %v\n",
			s.kind, s.name, printable(s.String()), params, strings.Join(s.paths, " "), s.timeout)
		if err := s.check(); err != nil {
			faults = append(faults, fmt.Errorf("--%s %s: %w", s.kind, s.name, err))
		}
	}
	for _, doubt := range p.doubts {
		fmt.Fprintln(stdout, "looks like a mistake:", printable(doubt))
	}
	if err := errors.Join(faults...); err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			fmt.Fprintln(stdout, printable(line))
		}
		return 1
	}
	fmt.Fprintln(stdout, "ok")
	return 0
}

// printable quotes a text that would not be seen, or do something to a terminal.
func printable(text string) string {
	if strings.ContainsFunc(text, unicode.IsControl) {
		return strconv.Quote(text)
	}
	return text
}

// once prints what a scrape of /metrics, or of the only endpoint, would get.
func (p *program) once(stdout io.Writer) int {
	path := "/metrics"
	if len(p.endpoints[path]) == 0 && len(p.endpoints) == 1 {
		path = slices.Collect(maps.Keys(p.endpoints))[0]
	}
	sources := p.endpoints[path]
	if len(sources) == 0 {
		p.log.Error("no source is served there, and there are several other endpoints", "path", path)
		return 1
	}
	timeout := p.scrapeTimeout(sources, "")
	want := &pageRequest{sources: sources}
	want.tickets, _ = askAll(sources, nil, prometheus3, time.Now().Add(timeout-margin(timeout))) // all have defaults
	sp, err := p.openPage(context.Background(), want, timeout)
	if err != nil {
		p.log.Error("no page before the deadline", "err", err)
		return 1
	}
	(*net.Buffers)(&sp.chunks).WriteTo(stdout)
	p.logFindings(sp.findings)
	if slices.ContainsFunc(sp.results, func(r *result) bool { return r.failure != nil }) {
		return 1
	}
	return 0
}

// checkHealth returns an error if no healthy reverse_exporter listens on the address. It does not verify who
// answers, for the request reveals nothing.
func (a address) checkHealth(timeout time.Duration) error {
	client := http.Client{Timeout: timeout, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, a.network, a.addr)
		},
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
	scheme := "http"
	if a.tls {
		scheme = "https"
	}
	resp, err := client.Get(scheme + "://localhost/-/healthy")
	if err != nil {
		return withoutURL(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("X-Content-Type-Options") == "" {
		return fmt.Errorf("it answered %s", resp.Status)
	}
	return nil
}

// hashIterations makes a small ARM board stretch a password within a second.
const hashIterations = 200_000

// hashPassword prints the hash of the password in the first line of standard input.
func hashPassword(stdin io.Reader, stdout, stderr io.Writer) int {
	if file, ok := stdin.(*os.File); ok {
		if info, err := file.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			fmt.Fprint(stderr, "Password (it will be seen): ")
		}
	}
	in := bufio.NewReader(io.LimitReader(stdin, 4<<10))
	line, err := in.ReadString('\n')
	password := strings.TrimSuffix(strings.TrimSuffix(line, "\r\n"), "\n")
	fault := ""
	switch {
	case err != nil && err != io.EOF:
		fault = err.Error()
	case password == "":
		fault = "the password is empty"
	case in.Buffered() > 0:
		fault = "there is more than one line"
	case len(line) == 4<<10:
		fault = "the password is longer than 4 KiB"
	case strings.IndexByte(password, 0) >= 0, strings.HasPrefix(password, "\ufeff"), !utf8.ValidString(password):
		fault = "the password holds a NUL byte, begins with a byte order mark, or is not UTF-8"
	}
	if fault != "" {
		return complain(stderr, 1, "--hash-password reads one line, a password, from standard input: "+fault)
	}
	fmt.Fprintf(stdout, "%s\n", appendHash(nil, password, hashIterations))
	return 0
}

// appendHash appends the hash of a password.
func appendHash(dst []byte, password string, iterations int) []byte {
	salt := make([]byte, 16)
	rand.Read(salt)
	key := stretch(password, salt, iterations)
	encode := base64.RawStdEncoding.EncodeToString
	return fmt.Appendf(dst, "pbkdf2-sha256$%d$%s$%s", iterations, encode(salt), encode(key))
}
