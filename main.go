// Reverse_exporter turns an appliance with several Prometheus exporters, .prom
// files and scripts inside into one scrape target.
//
// The way of the data:
//
//	flags -> []source -> fetch (all at once, each behind its waterfall) -> parse and label -> merge -> write
//
// This file has both ends: it turns flags into sources, and requests into pages
// that merge what the sources hold. Commands and the waterfall are in exec.go,
// the text format in parse.go, families and pages in merge.go.
package main

import (
	"bufio"
	"bytes"
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
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
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
	"unicode/utf8"
)

// ---- Usage

// version is set by the linker.
var version = "dev"

const usage = `reverse_exporter turns many Prometheus exporters, .prom files and scripts into
one scrape target: one port, one /metrics, told apart by the label exporter_name.

Examples:
  reverse_exporter --http node=http://localhost:9100/metrics --http pg=http://localhost:9187/metrics
  reverse_exporter --file backup='/var/lib/metrics/*.prom' --exec certs='/usr/local/bin/certs --days 30'
  reverse_exporter --exec smart='smart.sh {disk=sda|sdb}' --timeout smart:30s --max-age smart:5m
  reverse_exporter --once --http node=http://localhost:9100/metrics
  printf %s "$PASSWORD" | reverse_exporter --hash-password
  CMD ["/reverse_exporter", "--http", "app=http://localhost:8080/metrics", "--label", "site=hel1"]
      (in a Dockerfile, where nothing expands $VAR)

Sources, repeatable; NAME becomes the value of exporter_name:
  --http NAME=URL         an exporter: http://, https:// or http://unix:/run/x.sock:/metrics
  --file NAME=PATTERN     text files, read on every scrape; PATTERN may be a glob
  --exec NAME=COMMAND     a command that prints metrics, run on demand without a shell;
                          {x}, {x=default}, {x=one|other} take the URL parameter x

Options; with NAME: for one source, without for all:
  --label [NAME:]KEY=VALUE     add a label to every sample; repeatable
  --timeout [NAME:]DURATION    longest time a fetch may take (10s)
  --max-bytes [NAME:]SIZE      largest body taken, as 512KiB, 32MiB (32MiB)
  --max-age [NAME:]DURATION    serve a result again while it is younger (0)
  --interval NAME:DURATION     fetch in the background, serve the last result
  --path [NAME:]/PATH          endpoint to be served on; repeatable (/metrics)
  --params NAME:LIST           URL parameters handed on to an http source, * for all
  --header NAME:'KEY: VALUE'   send a header to an http source; repeatable;
                               NAME:@FILE reads header lines from a file
  --ca-file NAME:FILE          certificates that an https source is verified against
  --insecure NAME,...          do not verify the certificates of these
  --raw NAME,...               do not add exporter_name
  --require NAME,...           answer 503 when one of these is down

Server:
  --web.listen-address ADDR    :9998, 127.0.0.1:9998, unix:/run/re.sock; repeatable (:9998);
                               http:// or https:// before it chooses TLS for this one
  --web.tls-cert-file FILE     serve https with this certificate ...
  --web.tls-key-file FILE      ... and its key
  --web.tls-client-ca-file FILE
                               demand client certificates that this CA verifies
  --web.basic-auth-file FILE   demand a password; lines of user:HASH, see --hash-password
  --log.level LEVEL            debug, info, warn or error (info)
  --log.format FORMAT          logfmt or json, on standard error (logfmt)

Modes:
  --once                  print the merged metrics and exit; 1 if a source is down
  --check                 validate the flags and the files they name, and exit
  --healthcheck           ask the program at the first --web.listen-address; exit 0 if it is well
  --hash-password         read a password from standard input and print its HASH
  --version, --help
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// ---- Running

// run is the program: it returns the exit status, which is 0, 1 for what went
// wrong, or 2 for flags that are wrong.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c, faults := parseFlags(args[1:])
	switch {
	case c.help:
		io.WriteString(stdout, usage)
		return 0
	case c.version:
		fmt.Fprintf(stdout, "reverse_exporter %s %s\n", version, runtime.Version())
		return 0
	case len(faults) > 0:
		for _, fault := range faults {
			fmt.Fprintln(stderr, "reverse_exporter:", fault)
		}
		return 2
	}
	switch {
	case c.hashPassword:
		return unlessDone(ctx, func() int { return hashPassword(stdin, stdout, stderr) })
	case c.healthcheck:
		return healthcheck(ctx, c.listen[0], stdout, stderr)
	case os.Getpid() == 1 && slices.ContainsFunc(c.sources, func(s *source) bool { return s.command != nil }):
		return asInit(ctx, args, stderr)
	}
	life, end := context.WithCancel(context.Background())
	p := newProgram(life, c, stderr)
	defer func() {
		end()
		p.waitForRuns(time.Second)
	}()
	switch {
	case c.check:
		return unlessDone(ctx, func() int { return p.check(stdout) })
	case !p.loadFiles():
		return 1
	case c.once:
		return p.once(ctx, stdout)
	}
	return p.serve(ctx)
}

// unlessDone returns what do returns, or 1 once ctx is done: what waits for standard
// input, a disk or the end of a process cannot be told to stop.
func unlessDone(ctx context.Context, do func() int) int {
	code := make(chan int, 1)
	go func() { code <- do() }()
	select {
	case <-ctx.Done():
		return 1
	case code := <-code:
		return code
	}
}

// waitForRuns waits until all fetches have ended and their commands are killed,
// or d has passed: what hangs in the kernel is left to it.
func (p *program) waitForRuns(d time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	unlessDone(ctx, func() int {
		for _, s := range p.sources {
			s.mu.Lock() // who started a run before the end has done so by now
			s.mu.Unlock()
			s.runs.Wait()
		}
		return 0
	})
}

// program is what runs once the flags are understood.
type program struct {
	*config
	log         *slog.Logger
	endpoints   map[string][]*source // by path
	started     time.Time
	pages       pages
	connections connections
	refusals    atomic.Uint64 // requests without a right password or certificate
	windows     sync.Pool     // of *workspace

	stopping context.Context // done when scrapes have to do with what is there
	stop     context.CancelFunc

	process  atomic.Pointer[processMetrics]
	warnedMu sync.Mutex // guards warned
	warned   map[string]bool
}

// newProgram puts the parts together. Its fetches end with life.
func newProgram(life context.Context, c *config, stderr io.Writer) *program {
	options := &slog.HandlerOptions{Level: c.logLevel}
	p := &program{config: c, endpoints: map[string][]*source{}, started: time.Now(), warned: map[string]bool{}}
	p.pages.freed = make(chan struct{}, 1)
	p.stopping, p.stop = context.WithCancel(context.Background())
	p.log = slog.New(slog.NewTextHandler(stderr, options))
	if c.logFormat == "json" {
		p.log = slog.New(slog.NewJSONHandler(stderr, options))
	}
	for _, w := range c.watched {
		w.log = p.log
	}
	for _, s := range c.sources {
		s.life = life
		s.pinned = s.interval > 0
		s.windows = &p.windows
		s.count = func(standard bool, r *result) func() { return p.count(s, standard, r) }
		for _, path := range s.paths {
			p.endpoints[path] = append(p.endpoints[path], s)
		}
	}
	return p
}

// loadFiles reads the files that flags name, and logs what is wrong with them.
func (p *program) loadFiles() bool {
	ok := true
	for _, w := range p.watched {
		if err := w.load(); err != nil {
			p.log.Error("failed to read what a flag names", "err", err)
			ok = false
		}
	}
	return ok
}

// serve listens and answers until ctx is done, then lets running scrapes end.
func (p *program) serve(ctx context.Context) int {
	listeners, err := p.listenAll()
	if err != nil {
		p.log.Error("failed to listen", "err", err)
		return 1
	}
	server := p.newServer()
	failed := make(chan error, len(listeners))
	for i, l := range listeners {
		p.log.Info("listening", "address", l.Addr().String(), "tls", p.listen[i].tls)
		go func() { failed <- server.Serve(l) }()
	}
	for _, s := range p.sources {
		if s.interval > 0 {
			go p.repeat(ctx, s)
		}
	}
	code := 0
	select {
	case <-ctx.Done():
	case err := <-failed:
		p.log.Error("failed to serve", "err", err)
		code = 1
	}
	defer time.AfterFunc(2*time.Second, p.stop).Stop()
	grace, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	if server.Shutdown(grace) != nil {
		server.Close()
	}
	return code
}

// repeat fetches a source at its interval. Its waterfall is pinned: the result of
// a fetch stays until there is another. A slow fetch skips beats.
func (p *program) repeat(ctx context.Context, s *source) {
	beat := time.NewTicker(s.interval)
	defer beat.Stop()
	for ctx.Err() == nil {
		t := s.join(arguments{standard: true}, true)
		s.wait(ctx, t)
		s.leave(t, false)
		select {
		case <-ctx.Done():
		case <-beat.C:
		}
	}
}

// asInit runs the program as a child of itself.
func asInit(ctx context.Context, args []string, stderr io.Writer) int {
	path, err := os.Executable()
	if err != nil { // there is no /proc
		path = args[0]
	}
	code, err := supervise(ctx, path, args)
	if err != nil {
		fmt.Fprintln(stderr, "reverse_exporter:", err)
	}
	return code
}

// supervise runs the program once more as a child, and is what PID 1 has to be:
// it forwards signals and reaps every orphan. So the child's wait for a command
// never races with the reaping. It returns the child's exit status.
func supervise(ctx context.Context, path string, args []string) (int, error) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	child, err := syscall.ForkExec(path, args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	if err != nil {
		return 1, fmt.Errorf("failed to start %s again, to reap processes as PID 1: %w", path, err)
	}
	defer context.AfterFunc(ctx, func() { syscall.Kill(child, syscall.SIGTERM) })() // it may have come before signals did
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
			return 1, fmt.Errorf("failed to wait as PID 1: %w", err)
		case pid == child && status.Exited():
			return status.ExitStatus(), nil
		case pid == child && status.Signaled():
			return 128 + int(status.Signal()), nil
		}
	}
}

// ---- Options

// config is what the flags say.
type config struct {
	sources   []*source // in the order of the flags
	listen    []address
	tls       serverTLS
	passwords *passwords // nil if none are demanded
	watched   []*watched // the files that flags name, which are taken up when they change
	logLevel  slog.Level
	logFormat string

	help, version, check, once, healthcheck, hashPassword bool
}

// flags gathers what stands on the command line, and every fault in it.
type flags struct {
	config
	given  map[string][]string // values by flag
	byName map[string]*source
	number int // of sources given, good or bad
	faults []string
}

// parseFlags turns a command line into what it says, and all that is wrong in
// it. A fault names the flag and the source but no value that may be secret.
func parseFlags(args []string) (*config, []string) {
	f := &flags{given: map[string][]string{}, byName: map[string]*source{}}
	f.readArgs(args)
	if f.help || f.version {
		return &f.config, nil
	}
	f.setOptions()
	f.checkTogether()
	f.setServer()
	if len(f.sources) == 0 && len(f.faults) == 0 && !f.healthcheck && !f.hashPassword {
		f.fault(`there is no source. For example:
  reverse_exporter --http node=http://localhost:9100/metrics
  reverse_exporter --file backup='/var/lib/metrics/*.prom' --exec certs=/usr/local/bin/certs`)
	}
	return &f.config, f.faults
}

// readArgs reads the command line, and goes on behind each fault. The flags are
// those that usage has; all but the modes take a value.
func (f *flags) readArgs(args []string) {
	modes := map[string]*bool{"help": &f.help, "h": &f.help, "version": &f.version, "check": &f.check, "once": &f.once,
		"healthcheck": &f.healthcheck, "hash-password": &f.hashPassword}
	for i := 0; i < len(args); i++ {
		name, isFlag := strings.CutPrefix(args[i], "-")
		name, value, hasValue := strings.Cut(strings.TrimPrefix(name, "-"), "=")
		mode := modes[name]
		switch {
		case !isFlag:
			f.fault("argument %d is no flag; a value with blanks needs quotes", i+1)
		case strings.ContainsAny(name, " ,:"):
			f.fault("argument %d is no flag; a flag and its value are two arguments, or --flag=value", i+1) // it may be secret
		case mode != nil && !hasValue:
			*mode = true
		case mode != nil:
			f.fault("--%s takes no value", name)
		case !strings.Contains(usage, "\n  --"+name+" "):
			f.fault("there is no flag --%s; see --help", name)
			if !hasValue && i+1 < len(args) && !strings.HasPrefix(args[i+1], "-") {
				i++ // its value
			}
		case hasValue:
			f.give(name, value)
		case i+1 == len(args):
			f.fault("--%s needs a value; see --help", name)
		default:
			i++
			f.give(name, args[i])
		}
	}
}

// give keeps what a flag was given.
func (f *flags) give(name, value string) {
	if _, isSource := kinds[name]; isSource {
		f.addSource(name, value)
	} else {
		f.given[name] = append(f.given[name], value)
	}
}

// fault keeps what is wrong.
func (f *flags) fault(format string, args ...any) {
	f.faults = append(f.faults, fmt.Sprintf(format, args...))
}

// addSource adds the source of an --http, --file or --exec flag.
func (f *flags) addSource(kind, value string) {
	f.number++
	name, what, ok := strings.Cut(value, "=")
	if !ok || !isSourceName(name) {
		f.fault("--%s, source %d: NAME=%s is needed, with a NAME of letters, digits, _ . and - that begins with a letter or digit",
			kind, f.number, kinds[kind].what)
		return
	}
	if name == ownName {
		f.fault("--%s %s: this name is the program's own", kind, name)
	}
	if f.byName[name] != nil {
		f.fault("--%s %s: another source has this name", kind, name)
		return
	}
	s := &source{name: name, kind: kind}
	f.byName[name] = s
	f.sources = append(f.sources, s)
	if err := kinds[kind].set(s, what); err != nil {
		f.fault("--%s %s: %v", kind, name, err)
	}
}

// kinds are the flags that make a source: what they are given, what takes it, and the
// reasons that such a source can fail for.
var kinds = map[string]struct {
	what    string
	set     func(s *source, what string) error
	reasons []string
}{
	"http": {"URL", (*source).setURL, []string{"busy", "connect", "content_type", "encoding", "internal", "parse", "read", "status", "timeout", "tls", "too_large"}},
	"file": {"PATTERN", (*source).setPattern, []string{"busy", "file", "internal", "parse", "read", "timeout", "too_large"}},
	"exec": {"COMMAND", (*source).setCommand, []string{"busy", "exit", "internal", "parse", "start", "timeout", "too_large"}},
}

// ownName is the exporter_name of the program itself.
const ownName = "reverse_exporter"

// isSourceName reports whether a source may have the name.
func isSourceName(name string) bool {
	for i, c := range []byte(name) {
		if class[c]&labelByte == 0 && (i == 0 || c != '.' && c != '-') || i == 0 && c == '_' {
			return false
		}
	}
	return name != ""
}

// setOptions gives the sources their options.
func (f *flags) setOptions() {
	for _, s := range f.sources {
		s.timeout, s.maxBytes = 10*time.Second, 32<<20
	}
	f.each("timeout", false, func(s *source, value string) (err error) {
		s.timeout, err = parseDuration(value, true)
		return err
	})
	f.each("max-bytes", false, func(s *source, value string) (err error) {
		s.maxBytes, err = parseSize(value)
		return err
	})
	f.each("max-age", false, func(s *source, value string) (err error) {
		s.maxAge, err = parseDuration(value, false)
		return err
	})
	f.each("interval", true, func(s *source, value string) (err error) {
		if s.interval, err = parseDuration(value, true); err == nil && s.interval < 100*time.Millisecond {
			err = errors.New("100ms is the least")
		}
		return err
	})
	f.each("params", true, func(s *source, value string) error {
		if s.exporter == nil {
			return errors.New("only an http source has parameters; a command takes {x}")
		}
		s.exporter.params = strings.Split(value, ",")
		return nil
	})
	f.each("ca-file", true, func(s *source, value string) error {
		if !s.isHTTPS() {
			return errors.New("only an https source is verified")
		}
		s.exporter.caFile = f.watch("--ca-file "+s.name, s.exporter.takeRoots, value)
		return nil
	})
	f.names("insecure", func(s *source) {
		if !s.isHTTPS() {
			f.fault("--insecure %s: only an https source is verified", s.name)
			return
		}
		s.exporter.insecure = true
	})
	f.setHeaders()
	f.names("raw", func(s *source) { s.raw = true })
	f.names("require", func(s *source) { s.require = true })
	f.setPaths()
	f.setLabels()
}

// scoped is a value of an option, and the sources that it is for.
type scoped struct {
	sources []*source
	name    string // empty if it is for all
	value   string
}

// values returns what an option was given, values for all sources first, so that
// those for one can overrule them. With named, none may be for all.
func (f *flags) values(option string, named bool) []scoped {
	var general, specific []scoped
	for _, given := range f.given[option] {
		name, value, ok := strings.Cut(given, ":")
		ok = ok && isSourceName(name)
		wrong, _, equals := strings.Cut(given, "=")
		switch {
		case ok && f.byName[name] == nil:
			f.fault("--%s %s: no source has this name", option, name)
		case ok:
			specific = append(specific, scoped{[]*source{f.byName[name]}, name, value})
		case equals && option != "label" && f.byName[wrong] != nil:
			shown := given[len(wrong)+1:]
			if option == "header" {
				shown = "…" // it may be secret
			}
			f.fault("--%s %s=: a colon belongs behind the name, write --%s %s:%s", option, wrong, option, wrong, shown)
		case named:
			f.fault("--%s: a NAME: is needed in front", option)
		default:
			general = append(general, scoped{f.sources, "", given})
		}
	}
	return append(general, specific...)
}

// each sets an option at the sources that its values are for. A source can have
// one value, or one for each label, and the order of flags does not matter: two that
// differ are a fault.
func (f *flags) each(option string, named bool, set func(s *source, value string) error) {
	first := map[string]string{}
	for _, v := range f.values(option, named) {
		shown := strings.TrimPrefix(v.name+":"+v.value, ":")
		what := v.name
		if key, _, ok := strings.Cut(v.value, "="); ok && option == "label" {
			what += ":" + key
		}
		if other, ok := first[what]; ok && other != v.value {
			f.fault("--%s %s: given twice, with different values", option, shown)
		}
		first[what] = v.value
		if len(f.sources) == 0 {
			v.sources = []*source{{}} // to find what is wrong with the value all the same
		}
		for _, s := range v.sources {
			if err := set(s, v.value); err != nil {
				f.fault("--%s %s: %v", option, shown, err)
				break
			}
		}
	}
}

// names calls set for each source in the lists that an option was given.
func (f *flags) names(option string, set func(s *source)) {
	for _, list := range f.given[option] {
		for name := range strings.SplitSeq(list, ",") {
			if s := f.byName[name]; s != nil {
				set(s)
			} else {
				f.fault("--%s %s: no source has this name", option, name)
			}
		}
	}
}

// parseDuration parses a duration as Go does, with d for a day.
func parseDuration(text string, positive bool) (time.Duration, error) {
	days, rest, hasDays := strings.Cut(text, "d")
	if !hasDays {
		days, rest = "0", text
	} else if rest == "" {
		rest = "0s"
	}
	n, err := strconv.ParseFloat(days, 64)
	d, err2 := time.ParseDuration(rest)
	total := n*float64(24*time.Hour) + float64(d)
	switch {
	case err != nil || err2 != nil || n < 0 || d < 0 || !(total <= float64(366*24*time.Hour)):
		return 0, errors.New("a duration is needed, as 500ms, 10s, 5m, 1h30m or 2d, and of a year at most")
	case positive && total == 0:
		return 0, errors.New("the duration must be longer than 0")
	}
	return time.Duration(total), nil
}

// parseSize parses a whole number with its unit.
func parseSize(text string) (int64, error) {
	number := strings.TrimRight(text, "KMGiB")
	unit := map[string]uint64{"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[text[len(number):]]
	n, err := strconv.ParseUint(number, 10, 31)
	switch {
	case unit == 0 || err != nil || n == 0:
		return 0, errors.New("a whole number with B, KiB, MiB or GiB is needed, as 32MiB")
	case n > 1<<30/unit:
		return 0, errors.New("1GiB is the most")
	}
	return int64(n * unit), nil
}

// setPaths gives the sources their endpoints: their own, or else the general ones.
func (f *flags) setPaths() {
	paths := map[string][]string{} // by NAME, "" for all
	for _, v := range f.values("path", false) {
		if err := checkPath(v.value); err != nil {
			f.fault("--path %s: %v", v.value, err)
		} else if !slices.Contains(paths[v.name], v.value) {
			paths[v.name] = append(paths[v.name], v.value)
		}
	}
	for _, s := range f.sources {
		s.paths = []string{"/metrics"}
		for _, name := range []string{"", s.name} {
			if len(paths[name]) > 0 {
				s.paths = paths[name]
			}
		}
	}
}

// checkPath says why an endpoint cannot have the path.
func checkPath(name string) error {
	switch {
	case !strings.HasPrefix(name, "/"):
		return errors.New("a path begins with /")
	case name == "/", name == "/-", strings.HasPrefix(name, "/-/"):
		return errors.New("this path is the program's own")
	case path.Clean(name) != name, (&url.URL{Path: name}).EscapedPath() != name:
		return errors.New("a path has plain characters, no ? # % or \\, no . or .. between slashes, and no / at its end")
	}
	return nil
}

// setLabels gives the sources the labels that they add.
func (f *flags) setLabels() {
	f.each("label", false, func(s *source, label string) error {
		key, value, err := parseLabel(label)
		if s.labels == nil {
			s.labels = map[string]string{}
		}
		s.labels[key] = value
		return err
	})
	for _, s := range f.sources {
		if !s.raw {
			s.added.add("exporter_name", s.name)
			s.added.telling = !hasMeta(s.pattern) // two files may have the same series
		}
		for _, key := range slices.Sorted(maps.Keys(s.labels)) {
			s.added.add(key, s.labels[key])
		}
	}
}

// parseLabel parses KEY=VALUE.
func parseLabel(label string) (key, value string, err error) {
	key, value, ok := strings.Cut(label, "=")
	switch {
	case !ok || !isBareLabel([]byte(key)):
		err = errors.New("KEY=VALUE is needed, with a KEY of letters, digits and _ that begins with no digit")
	case key == "exporter_name" || key == "le" || key == "quantile" || strings.HasPrefix(key, "__"):
		err = fmt.Errorf("the label name %s is reserved", key)
	case value == "" || !utf8.ValidString(value):
		err = errors.New("a VALUE is needed, in UTF-8")
	}
	return key, value, err
}

// setHeaders gives the http sources the headers that they are sent. As a header may
// be secret, no fault tells its value.
func (f *flags) setHeaders() {
	files := map[*source][]string{}
	for _, v := range f.values("header", true) {
		for _, s := range v.sources {
			if s.exporter == nil {
				f.fault("--header %s: only an http source is sent headers", s.name)
			} else if name, ok := strings.CutPrefix(v.value, "@"); ok {
				files[s] = append(files[s], name)
			} else if key, value, err := parseHeader(v.value); err != nil {
				f.fault("--header %s: %v", s.name, err)
			} else {
				s.exporter.fixed.Add(key, value)
			}
		}
	}
	for _, s := range f.sources {
		if len(files[s]) > 0 {
			s.exporter.headerFiles = f.watch("--header "+s.name, s.exporter.takeHeaders, files[s]...)
		}
	}
}

// watch has files read at start, and again when they change.
func (f *flags) watch(flag string, take func(texts [][]byte) error, names ...string) *watched {
	for _, w := range f.watched {
		if w.flag == flag { // given twice
			return w
		}
	}
	w := &watched{flag: flag, names: names, take: take}
	f.watched = append(f.watched, w)
	return w
}

// checkTogether finds options that exclude each other.
func (f *flags) checkTogether() {
	for _, s := range f.sources {
		takes := ""
		switch {
		case s.exporter != nil && s.exporter.params != nil:
			takes = "--params"
		case s.command != nil && len(s.command.params) > 0:
			takes = "a placeholder"
		}
		if s.interval > 0 && s.maxAge > 0 {
			f.fault("--interval %s: not together with --max-age; --max-age %s:0s takes it out of a general one", s.name, s.name)
		}
		if s.interval > 0 && takes != "" {
			f.fault("--interval %s: not together with %s", s.name, takes)
		}
		if s.command != nil && s.command.needs() != "" && !f.alone(s) {
			f.fault("--exec %s: {%s} has no default, so it needs a --path of its own, as --path %s:/%s",
				s.name, s.command.needs(), s.name, s.name)
		}
	}
}

// alone reports whether no other source is served where s is.
func (f *flags) alone(s *source) bool {
	return !slices.ContainsFunc(f.sources, func(other *source) bool {
		return other != s && slices.ContainsFunc(other.paths, func(path string) bool {
			return slices.Contains(s.paths, path)
		})
	})
}

// setServer sets what is not of a source.
func (f *flags) setServer() {
	f.setListen(len(f.given["web.tls-cert-file"]) > 0)
	f.setTLS()
	if file := f.one("web.basic-auth-file"); file != "" {
		f.passwords = newPasswords()
		f.passwords.file = f.watch("--web.basic-auth-file", f.passwords.take, file)
	}
	f.logLevel = slog.LevelInfo
	for _, level := range f.given["log.level"] {
		if err := f.logLevel.UnmarshalText([]byte(level)); err != nil {
			f.fault("--log.level %s: debug, info, warn or error is needed", level)
		}
	}
	for _, f.logFormat = range f.given["log.format"] {
		if f.logFormat != "logfmt" && f.logFormat != "json" {
			f.fault("--log.format %s: logfmt or json is needed", f.logFormat)
		}
	}
}

// setTLS sets the certificates that listeners serve with.
func (f *flags) setTLS() {
	cert, key, ca := f.one("web.tls-cert-file"), f.one("web.tls-key-file"), f.one("web.tls-client-ca-file")
	served := slices.ContainsFunc(f.listen, func(a address) bool { return a.tls })
	names := []string{cert, key}
	switch {
	case f.healthcheck || f.hashPassword: // they read no files
		return
	case (cert == "") != (key == ""):
		f.fault("--web.tls-cert-file and --web.tls-key-file belong together (they may name one file that has both)")
	case served && cert == "":
		f.fault("--web.listen-address: one begins with https://, so --web.tls-cert-file and --web.tls-key-file are needed")
	case cert != "" && !served:
		f.fault("--web.tls-cert-file: every --web.listen-address begins with http://, so nothing would be served with it")
	case ca != "" && cert == "":
		f.fault("--web.tls-client-ca-file: --web.tls-cert-file and --web.tls-key-file are needed")
	case ca != "":
		f.tls.clients = true
		names = append(names, ca)
	}
	if cert != "" {
		f.tls.files = f.watch("--web.tls-cert-file", f.tls.take, names...)
	}
}

// one returns the value of an option that can have only one, "" without.
func (f *flags) one(option string) (file string) {
	for _, file = range f.given[option] {
		if file == "" || file != f.given[option][0] {
			f.fault("--%s %s: one file is needed", option, file)
		}
	}
	return file
}

// ---- Listening

// address is where the program listens.
type address struct {
	network, addr string
	tls           bool
}

// setListen sets the addresses to listen on, with TLS if they do not say otherwise.
func (f *flags) setListen(withTLS bool) {
	texts := f.given["web.listen-address"]
	if len(texts) == 0 {
		texts = []string{":9998"}
	}
	for i, text := range texts {
		a, err := parseAddress(text, withTLS)
		if err != nil {
			f.fault("--web.listen-address %s: %v", text, err)
		} else if slices.Contains(texts[:i], text) {
			f.fault("--web.listen-address %s: given twice", text)
		}
		f.listen = append(f.listen, a)
	}
}

// parseAddress parses an address to listen on, with TLS if it does not say otherwise.
func parseAddress(text string, withTLS bool) (address, error) {
	a := address{"tcp", text, withTLS}
	if addr, ok := strings.CutPrefix(text, "https://"); ok {
		a.addr, a.tls = addr, true
	} else if addr, ok := strings.CutPrefix(text, "http://"); ok {
		a.addr, a.tls = addr, false
	}
	if path, ok := strings.CutPrefix(a.addr, "unix:"); ok {
		a.network, a.addr = "unix", path
		if path == "" || path[0] == '@' {
			return a, errors.New("a path is needed, as unix:/run/re.sock")
		}
		return a, nil
	}
	_, port, err := net.SplitHostPort(a.addr)
	if err != nil || !isPort(port, false) {
		return a, errors.New("an address is needed, as :9998, 127.0.0.1:9998 or unix:/run/re.sock")
	}
	return a, nil
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
			return nil, err
		}
		if a.tls {
			l = tls.NewListener(l, &tls.Config{GetConfigForClient: p.tls.current})
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// listen opens a listener. A Unix socket is for all who may enter its folder.
func (a address) listen() (net.Listener, error) {
	if a.network == "unix" {
		if err := removeStale(a.addr); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen(a.network, a.addr)
	if err == nil && a.network == "unix" {
		if err = os.Chmod(a.addr, 0o666); err != nil {
			l.Close()
		}
	}
	return l, err
}

// removeStale removes the socket of a program that has ended without doing so.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return nil // it is not there, or Listen will tell
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s exists and is no socket", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		conn.Close()
		return fmt.Errorf("another program listens at %s", path)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return os.Remove(path)
	}
	return nil
}

// serverTLS is what listeners with TLS serve with.
type serverTLS struct {
	clients bool     // they must have a certificate
	files   *watched // of certificate, key and, if clients need one, their CA
	config  atomic.Pointer[tls.Config]
}

// current returns what the next handshake is done with.
func (t *serverTLS) current(*tls.ClientHelloInfo) (*tls.Config, error) {
	t.files.refresh()
	return t.config.Load(), nil
}

// take keeps what the files hold. A client without a certificate may connect, so that
// it can be told what is missing.
func (t *serverTLS) take(texts [][]byte) error {
	cert, err := tls.X509KeyPair(texts[0], texts[1])
	if err != nil {
		return fmt.Errorf("%s, %s: %w", t.files.names[0], t.files.names[1], err)
	}
	c := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	if t.clients {
		c.ClientAuth = tls.VerifyClientCertIfGiven
		if c.ClientCAs, err = newPool(texts[2]); err != nil {
			return fmt.Errorf("%s: %w", t.files.names[2], err)
		}
	}
	t.config.Store(c)
	return nil
}

// newServer returns the server of all listeners. It speaks HTTP/1 only: so one
// connection is one request, for those who count them.
func (p *program) newServer() *http.Server {
	server := &http.Server{
		Handler:                      p,
		DisableGeneralOptionsHandler: true, // it would answer those who may not ask
		ReadHeaderTimeout:            10 * time.Second,
		WriteTimeout:                 10 * time.Second, // send renews it
		IdleTimeout:                  5 * time.Minute,
		MaxHeaderBytes:               8 << 10,
		ErrorLog:                     slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		Protocols:                    new(http.Protocols),
		ConnState:                    p.connections.changed,
	}
	server.Protocols.SetHTTP1(true)
	return server
}

// connections are those of the clients. There is room for 1,024, or half of
// the file descriptors; one more closes the one that has been idle for longest, or
// that has been served for longest if none is idle.
type connections struct {
	mu   sync.Mutex // guards all
	room int
	all  map[net.Conn]connection
}

// connection is the state of a connection.
type connection struct {
	served bool // a request of its is being answered
	since  time.Time
}

// changed makes room for a new connection, notes whether a request of it is being
// answered, and forgets it once it is closed.
func (cs *connections) changed(conn net.Conn, state http.ConnState) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.all == nil {
		cs.all, cs.room = map[net.Conn]connection{}, maxConnections()
	}
	_, here := cs.all[conn]
	switch {
	case state == http.StateNew:
		if len(cs.all) >= cs.room {
			cs.evict()
		}
		cs.all[conn] = connection{since: time.Now()}
	case state == http.StateClosed:
		delete(cs.all, conn)
	case here: // it did not have to make room
		cs.all[conn] = connection{state == http.StateActive, time.Now()}
	}
}

// maxConnections is how many connections there may be at once.
func maxConnections() int {
	var files syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files) != nil {
		return 1024
	}
	return int(min(1024, files.Cur/2))
}

// evict closes one connection. The caller holds mu.
func (cs *connections) evict() {
	var first net.Conn
	for conn, c := range cs.all {
		worst := cs.all[first]
		if first == nil || worst.served && !c.served || worst.served == c.served && c.since.Before(worst.since) {
			first = conn
		}
	}
	delete(cs.all, first)
	if secure, ok := first.(*tls.Conn); ok {
		first = secure.NetConn() // which says no goodbye, for that could take long
	}
	first.Close()
}

// ---- Who may ask

// ServeHTTP answers one request.
func (p *program) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer p.recoverPanic()
	if r.ContentLength != 0 { // a body, which is not read: its sender has 10 s to go
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
	case !get:
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD are answered", http.StatusMethodNotAllowed)
	case isEndpoint:
		p.scrape(w, r, sources)
	case r.URL.Path == "/":
		p.index(w)
	default:
		http.Error(w, "there is nothing at this path; / lists the endpoints", http.StatusNotFound)
	}
}

// recoverPanic logs a fault of the program itself, and has the answer cut off.
func (p *program) recoverPanic() {
	v := recover()
	if v == nil {
		return
	}
	if v != http.ErrAbortHandler {
		p.log.Error("a fault in reverse_exporter", "panic", v, "stack", string(debug.Stack()))
	}
	panic(http.ErrAbortHandler)
}

// admits reports whether the request comes from someone who may ask. If not it refuses
// and counts it.
func (p *program) admits(w http.ResponseWriter, r *http.Request) bool {
	if p.tls.clients && (r.TLS == nil || len(r.TLS.VerifiedChains) == 0) {
		p.refusals.Add(1)
		http.Error(w, "a client certificate is needed", http.StatusForbidden)
		return false
	}
	if p.passwords == nil {
		return true
	}
	code := http.StatusUnauthorized
	name, password, ok := r.BasicAuth()
	if ok && strings.IndexByte(password, 0) < 0 { // NUL at the end would not change the key that is made of it
		code = p.passwords.check(r.Context(), name, password)
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(10 * time.Second)) // from now on
	}
	switch code {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", `Basic realm="reverse_exporter", charset="UTF-8"`)
		http.Error(w, "a user name and password are needed", code)
	case http.StatusServiceUnavailable:
		http.Error(w, "too many passwords are being checked", code)
	}
	if code != http.StatusOK {
		p.refusals.Add(1)
	}
	return code == http.StatusOK
}

// passwords are those that --web.basic-auth-file demands. To stretch one takes about a
// quarter of a second, so few are at a time, and one that was right is remembered.
type passwords struct {
	file  *watched
	users atomic.Pointer[map[string]*user] // by name

	key  []byte        // of digests
	line chan struct{} // has room for those who stretch or wait to
	turn chan struct{} // has room for the one who stretches
}

// user is what is known of a password.
type user struct {
	iterations int
	salt, key  []byte
	right      atomic.Pointer[[]byte] // keyed digest of the password once it was found
}

// newPasswords returns passwords that take the first file still.
func newPasswords() *passwords {
	ps := &passwords{key: make([]byte, 32), line: make(chan struct{}, 1+16), turn: make(chan struct{}, 1)}
	rand.Read(ps.key)
	return ps
}

// take keeps the users of a password file.
func (ps *passwords) take(texts [][]byte) error {
	us, old := map[string]*user{}, ps.users.Load()
	err := eachLine(texts[0], func(line string) error {
		name, hash, _ := strings.Cut(line, ":")
		u, err := parseHash(hash)
		if err == nil && (name == "" || us[name] != nil) {
			err = errors.New("the user has no name, or one that was there before")
		}
		if err == nil && old != nil && (*old)[name].same(u) {
			u = (*old)[name] // with what is known of it
		}
		us[name] = u
		return err
	})
	if err == nil && len(us) == 0 {
		err = errors.New("there is no user in it")
	}
	if err == nil {
		ps.users.Store(&us)
	}
	return err
}

// same reports whether the hash is the same.
func (u *user) same(other *user) bool {
	return u != nil && u.iterations == other.iterations && bytes.Equal(u.salt, other.salt) && bytes.Equal(u.key, other.key)
}

// parseHash parses pbkdf2-sha256$ITERATIONS$SALT$KEY.
func parseHash(hash string) (*user, error) {
	parts := strings.Split(hash, "$")
	if len(parts) != 4 || parts[0] != "pbkdf2-sha256" {
		return nil, errors.New("user:HASH is needed, with a HASH that --hash-password prints; bcrypt and others are not taken")
	}
	u := &user{}
	var err1, err2, err3 error
	u.iterations, err1 = strconv.Atoi(parts[1])
	u.salt, err2 = base64.RawStdEncoding.DecodeString(parts[2])
	u.key, err3 = base64.RawStdEncoding.DecodeString(parts[3])
	if err1 != nil || err2 != nil || err3 != nil || len(u.salt) < 8 || len(u.key) != sha256.Size {
		return nil, errors.New("the HASH is damaged")
	}
	if u.iterations < minIterations || u.iterations > maxIterations {
		return nil, fmt.Errorf("the HASH has %d iterations, which is not between %d and %d", u.iterations, minIterations, maxIterations)
	}
	return u, nil
}

// Iterations that a hash may have: fewer would be too cheap to guess, more would
// take too long on a small device.
const minIterations, maxIterations = 100_000, 2_000_000

// check returns 200 for the right password, 401 for a wrong one, or 503 if too many
// wait to be checked or ctx is done. An unknown user costs as much as a known one.
func (ps *passwords) check(ctx context.Context, name, password string) int {
	ps.file.refresh()
	us := *ps.users.Load()
	u, known := us[name]
	digest := ps.digest(password)
	if known && u.knows(digest) {
		return http.StatusOK
	}
	select {
	case ps.line <- struct{}{}:
		defer func() { <-ps.line }()
	default:
		return http.StatusServiceUnavailable
	}
	select {
	case ps.turn <- struct{}{}:
		defer func() { <-ps.turn }()
	case <-ctx.Done():
		return http.StatusServiceUnavailable
	}
	if known && u.knows(digest) { // found right while this one waited
		return http.StatusOK
	}
	if !known {
		names := slices.Sorted(maps.Keys(us))
		u = us[names[int(ps.digest(name)[0])%len(names)]] // always the same
	}
	key := stretch(password, u.salt, u.iterations)
	if hmac.Equal(key, u.key) && known {
		u.right.Store(&digest)
		return http.StatusOK
	}
	return http.StatusUnauthorized
}

// digest returns what a text is known by, here and for as long as the program runs.
func (ps *passwords) digest(password string) []byte {
	mac := hmac.New(sha256.New, ps.key)
	io.WriteString(mac, password)
	return mac.Sum(nil)
}

// knows reports whether the digest is that of the password found right before.
func (u *user) knows(digest []byte) bool {
	right := u.right.Load()
	return right != nil && hmac.Equal(*right, digest)
}

// stretch makes a key of a password, slowly.
func stretch(password string, salt []byte, iterations int) []byte {
	key, err := pbkdf2.Key(sha256.New, password, salt, iterations, sha256.Size)
	if err != nil {
		panic(err) // only for lengths that are not ours
	}
	return key
}

// ---- A scrape

// scrape answers with the metrics of an endpoint.
func (p *program) scrape(w http.ResponseWriter, r *http.Request, sources []*source) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		http.Error(w, "the query string is malformed", http.StatusBadRequest)
		return
	}
	if names, ok := query["exporter_name"]; ok {
		if sources = selected(sources, names); sources == nil {
			http.Error(w, "no source of this endpoint has this exporter_name", http.StatusNotFound)
			return
		}
	}
	shares, err := p.ask(sources, query)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	sp, err := p.openPage(r, sources, shares)
	if err != nil && r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has left; nothing would look like an empty page
	}
	control := http.NewResponseController(w)
	control.SetWriteDeadline(time.Now().Add(10 * time.Second)) // from now on
	if err != nil {
		http.Error(w, "no room for another page before the deadline", http.StatusServiceUnavailable)
		return
	}
	p.send(w, r, sp)
	if len(sp.conflicts) > 0 || sp.duplicates > 0 {
		control.Flush() // logging may block
		p.report(&sp.findings)
	}
}

// openPage waits for what the sources have for a scrape, then for a page of it, until the
// scrape's deadline.
func (p *program) openPage(r *http.Request, sources []*source, shares []share) (*sharedPage, error) {
	forSources, forAll := p.patience(sources, r.Header.Get(timeoutHeader))
	ctx, cancel := context.WithTimeout(r.Context(), forAll)
	defer cancel()
	waiting, stopWaiting := context.WithTimeout(ctx, forSources)
	defer stopWaiting()
	forget := context.AfterFunc(p.stopping, stopWaiting)
	defer forget()
	await(waiting, shares)
	defer leave(shares, waiting.Err() == context.DeadlineExceeded)
	process := p.processNow()
	return p.pages.open(ctx, &pageRequest{
		sources: sources,
		quoted:  acceptsQuotes(r.Header.Values("Accept")),
		gzip:    acceptsGzip(r.Header.Values("Accept-Encoding")),
		newest:  func() []*result { return resultsOf(shares) },
		render: func(ctx context.Context, results []*result, quoted bool) (*page, error) {
			return p.render(ctx, sources, results, quoted, process)
		},
	})
}

// selected returns the sources of the names in their order, nil if a name is
// none of theirs.
func selected(sources []*source, names []string) []*source {
	for _, name := range names {
		if !slices.ContainsFunc(sources, func(s *source) bool { return s.name == name }) {
			return nil
		}
	}
	return slices.DeleteFunc(slices.Clone(sources), func(s *source) bool { return !slices.Contains(names, s.name) })
}

// patience is how long a scrape may wait for its sources, and how long it may take until
// its answer begins. If the scraper announces no deadline, the sources get what a run under
// way and one of its own may take.
func (p *program) patience(sources []*source, header string) (forSources, forAll time.Duration) {
	var longest time.Duration
	for _, s := range sources {
		longest = max(longest, s.timeout)
	}
	seconds, err := strconv.ParseFloat(header, 64)
	if err != nil || !(seconds > 0) || math.IsInf(seconds, 1) {
		return 2 * longest, 2*longest + margin(2*longest)
	}
	d := time.Duration(min(seconds, 1e6) * float64(time.Second))
	if longest > d {
		p.warnOnce("", "a --timeout is longer than the deadline that a scraper announces", "timeout", longest, "deadline", d)
	}
	return d - margin(d), d
}

// margin is how much earlier than a deadline an answer should be under way.
func margin(d time.Duration) time.Duration {
	return min(d/10, 500*time.Millisecond)
}

// share is a scrape's share in one source.
type share struct {
	source *source
	ticket *ticket // nil if it was refused
}

// ask asks all sources at once, with the arguments that a query has for each.
func (p *program) ask(sources []*source, query url.Values) ([]share, error) {
	chosen := make([]arguments, len(sources))
	for i, s := range sources {
		var err error
		if chosen[i], err = s.arguments(query); err != nil {
			return nil, err
		}
	}
	shares := make([]share, len(sources))
	for i, s := range sources {
		shares[i] = share{s, s.join(chosen[i], false)}
	}
	return shares, nil
}

// await waits for all shares until ctx is done.
func await(ctx context.Context, shares []share) {
	for _, sh := range shares {
		if sh.ticket != nil {
			sh.source.wait(ctx, sh.ticket)
		}
	}
}

// resultsOf takes what is there for the shares, the newest.
func resultsOf(shares []share) []*result {
	results := make([]*result, len(shares))
	for i, sh := range shares {
		if sh.ticket != nil {
			results[i] = sh.source.take(sh.ticket)
		} else {
			results[i] = refused
		}
	}
	return results
}

// leave hands all shares back. A scrape that found no place, or spent its time in
// line, found the source busy; late says that its deadline passed.
func leave(shares []share, late bool) {
	for _, sh := range shares {
		if sh.ticket == nil || sh.source.leave(sh.ticket, late) && late {
			sh.source.busy()
		}
	}
}

// required returns the names of the sources that --require wants up and that
// are down.
func required(sources []*source, results []*result) []string {
	var down []string
	for i, s := range sources {
		if s.require && results[i].failure != nil {
			down = append(down, s.name)
		}
	}
	return down
}

// send writes a page to a scraper, which has to take 256 KiB every 10 s, and closes it.
func (p *program) send(w http.ResponseWriter, r *http.Request, sp *sharedPage) {
	defer p.pages.close(sp)
	if down := required(sp.sources, sp.results); len(down) > 0 {
		http.Error(w, "down: "+strings.Join(down, ", "), http.StatusServiceUnavailable)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	if sp.quoted {
		h.Set("Content-Type", "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8")
	}
	h.Set("Vary", "Accept, Accept-Encoding")
	chunks, size := sp.chunks, sp.size
	if acceptsGzip(r.Header.Values("Accept-Encoding")) {
		chunks, size = [][]byte{sp.zipped}, len(sp.zipped)
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("Content-Length", strconv.Itoa(size))
	if r.Method == http.MethodHead {
		return
	}
	out := &pacer{w: w, control: http.NewResponseController(w), page: sp.ctx}
	defer out.untilCut()()
	buffered, ok := p.pages.writers.Get().(*bufio.Writer)
	if !ok {
		buffered = bufio.NewWriterSize(nil, 32<<10)
	}
	buffered.Reset(out)
	for _, chunk := range chunks {
		buffered.Write(chunk)
	}
	err := buffered.Flush()
	buffered.Reset(nil)
	p.pages.writers.Put(buffered)
	if err != nil {
		p.log.Debug("a scraper was cut off", "err", err)
		panic(http.ErrAbortHandler)
	}
}

// pacer gives a scraper 10 s for each 256 KiB, while the page lasts.
type pacer struct {
	w       io.Writer
	control *http.ResponseController
	page    context.Context
	left    int // bytes to write before there are 10 s more
}

func (o *pacer) Write(b []byte) (n int, err error) {
	for n < len(b) {
		if o.left == 0 {
			o.left = 256 << 10
			o.control.SetWriteDeadline(time.Now().Add(10 * time.Second))
		}
		if err := o.page.Err(); err != nil {
			return n, err
		}
		m, err := o.w.Write(b[n:min(len(b), n+o.left)])
		n += m
		o.left -= m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// untilCut has writes fail once the page is cut off, until stop is called. Stop waits
// for a cut under way, which would hit the next answer of the connection, and gives the
// end of this one its time.
func (o *pacer) untilCut() (stop func()) {
	cut := make(chan struct{})
	cancel := context.AfterFunc(o.page, func() {
		o.control.SetWriteDeadline(time.Now())
		close(cut)
	})
	return func() {
		if !cancel() {
			<-cut
			o.control.SetWriteDeadline(time.Now().Add(10 * time.Second))
		}
	}
}

// acceptsGzip reads Accept-Encoding (RFC 9110, 12.5.3): whether gzip is welcome, and
// no less so than no encoding where that is rated, too.
func acceptsGzip(headers []string) bool {
	weights := map[string]float64{}
	eachChoice(headers, func(coding string, _ []string, weight float64) { weights[coding] = weight })
	for _, coding := range []string{"gzip", "x-gzip", "*"} {
		if weight, ok := weights[coding]; ok {
			return weight > 0 && weight >= weights["identity"]
		}
	}
	return false
}

// acceptsQuotes reads Accept: whether a text format with quoted names is welcome.
func acceptsQuotes(headers []string) bool {
	welcome := false
	eachChoice(headers, func(mediaType string, params []string, weight float64) {
		welcome = welcome || mediaType == "text/plain" && slices.Contains(params, "escaping=allow-utf-8") && weight > 0
	})
	return welcome
}

// withoutBlanks takes away what may stand around the words of a header.
var withoutBlanks = strings.NewReplacer(" ", "", "\t", "", `"`, "")

// eachChoice calls take for each choice of a list that a scraper accepts, with its
// parameters and its weight, which is 0 if it is none. All is in lower case, without
// blanks and quotes.
func eachChoice(headers []string, take func(choice string, params []string, weight float64)) {
	list := withoutBlanks.Replace(strings.ToLower(strings.Join(headers, ",")))
	for item := range strings.SplitSeq(list, ",") {
		params := strings.Split(item, ";")
		weight := 1.0
		for _, param := range params[1:] {
			if q, ok := strings.CutPrefix(param, "q="); ok {
				weight, _ = strconv.ParseFloat(q, 64)
			}
		}
		take(params[0], params[1:], min(weight, 1)) // Prometheus 2.49 sends q=2
	}
}

// ---- The overview page

// index answers with what the appliance holds, for people.
func (p *program) index(w http.ResponseWriter) {
	var rows []byte
	var up, down, samples int
	var size int64
	for _, s := range p.sources {
		c := s.status.copy()
		rows = s.appendRow(rows, c)
		samples += c.last.samples
		size += c.last.bytes
		if c.last.failure != nil {
			down++
		} else if c.fetched {
			up++
		}
	}
	b := fmt.Appendf(nil, "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">"+
		"<title>reverse_exporter</title><style>%s</style><h1>reverse_exporter</h1>\n<p>%d sources: <span class=up>%d up</span>, ", style, len(p.sources), up)
	b = fmt.Appendf(b, "<span%s>%d down</span>, %d not fetched yet. ", classIf(down > 0, "down"), down, len(p.sources)-up-down)
	b = fmt.Appendf(b, "%d samples, %s. Version %s, started %s.\n<p>Endpoints:", samples, sizeText(size), escapeHTML.Replace(version), ago(p.started))
	for _, path := range slices.Sorted(maps.Keys(p.endpoints)) {
		b = fmt.Appendf(b, ` <a href=".%s">%[1]s</a>`, escapeHTML.Replace(path))
	}
	for _, w := range p.watched {
		if w.broken.Load() {
			b = fmt.Appendf(b, "\n<p class=down>%s: a changed file cannot be taken up, see the log", escapeHTML.Replace(w.flag))
		}
	}
	b = append(b, "\n<table><thead><tr><th>Source<th>State<th>Kind<th>From<th>Took<th>Samples<th>Size<th>Last success<th>Error</thead>"...)
	h := w.Header()
	sum := sha256.Sum256([]byte(style))
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	w.Write(append(append(b, rows...), "\n</table>\n"...))
}

// escapeHTML makes text of what may hold the marks of HTML.
var escapeHTML = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;", "'", "&#39;")

// style is the look of the page at /.
const style = `:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;margin:1.5em auto;max-width:80em;padding:0 1em}` +
	`table{border-collapse:collapse;width:100%}tr{border-bottom:1px solid #8886}th,td{text-align:left;padding:.3em .8em .3em 0;vertical-align:top;white-space:nowrap}` +
	`th{font-weight:normal;opacity:.7}.w{white-space:normal;overflow-wrap:anywhere}.up{color:#197a3d}.down{color:#c6263e;font-weight:bold}` +
	`@media(prefers-color-scheme:dark){.up{color:#4cc38a}.down{color:#ff8589}a{color:#8ab4f8}}` +
	`@media(max-width:60em){thead{display:none}tr,td{display:block}tr{padding:.6em 0}td{padding:0}td[title]::before{content:attr(title) ": ";opacity:.7}}`

// appendRow appends a source to the table of the page at /.
func (s *source) appendRow(dst []byte, c counts) []byte {
	state, took := "", ""
	if c.last.failure != nil {
		state = "down"
	} else if c.fetched {
		state = "up"
	}
	if c.fetched {
		took = c.last.duration.Round(100 * time.Microsecond).String()
	}
	link := escapeHTML.Replace(s.name)
	if s.command == nil || s.command.needs() == "" {
		link = fmt.Sprintf(`<a href=".%s?exporter_name=%s">%[2]s</a>`, escapeHTML.Replace(s.paths[0]), link)
	}
	dst = fmt.Appendf(dst, "\n<tr><td>%s<td%s>%s<td title=Kind>%s<td title=From class=w>%s",
		link, classIf(state != "", state), cmp.Or(state, "not fetched yet"), s.kind, escapeHTML.Replace(s.origin))
	dst = fmt.Appendf(dst, "<td title=Took>%s<td title=Samples>%d<td title=Size>%s<td title=\"Last success\">%s",
		took, c.last.samples, sizeText(c.last.bytes), ago(c.lastSuccess))
	if c.last.failure != nil {
		dst = append(append(dst, "<td title=Error class=w>"...), escapeHTML.Replace(c.last.failure.err.Error())...)
	}
	return dst
}

// classIf returns a class attribute, or nothing.
func classIf(so bool, class string) string {
	if so {
		return " class=" + class
	}
	return ""
}

// sizeText says how large n bytes are.
func sizeText(n int64) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}

// ago says how long ago a time was.
func ago(t time.Time) string {
	d := time.Since(t)
	switch {
	case t.IsZero():
		return "never"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}

// ---- Small modes

// check looks at the files that the flags name.
func (p *program) check(stdout io.Writer) int {
	var faults []error
	for _, w := range p.watched {
		faults = append(faults, w.load())
	}
	for _, s := range p.sources {
		if err := s.check(); err != nil {
			faults = append(faults, fmt.Errorf("--%s %s: %w", s.kind, s.name, err))
		}
	}
	if err := errors.Join(faults...); err != nil {
		fmt.Fprintln(stdout, err)
		return 1
	}
	fmt.Fprintln(stdout, "all is fine")
	return 0
}

// once prints what a scrape of the only general endpoint would get.
func (p *program) once(ctx context.Context, stdout io.Writer) int {
	path := "/metrics"
	if len(p.endpoints[path]) == 0 && len(p.endpoints) == 1 {
		path = slices.Collect(maps.Keys(p.endpoints))[0]
	}
	sources := p.endpoints[path]
	shares, err := p.ask(sources, nil)
	if len(sources) == 0 {
		err = errors.New("no source is served there, and there are several other endpoints")
	}
	if err != nil {
		p.log.Error("nothing to print", "path", path, "err", err)
		return 1
	}
	forSources, _ := p.patience(sources, "")
	waiting, cancel := context.WithTimeout(ctx, forSources)
	defer cancel()
	await(waiting, shares)
	results := resultsOf(shares)
	leave(shares, waiting.Err() == context.DeadlineExceeded)
	pg, _ := p.render(context.Background(), sources, results, false, p.processNow())
	chunks := net.Buffers(pg.chunks)
	if _, err := chunks.WriteTo(stdout); err != nil {
		p.log.Error("failed to print", "err", err)
		return 1
	}
	p.report(&pg.findings)
	if slices.ContainsFunc(results, func(r *result) bool { return r.failure != nil }) {
		return 1
	}
	return 0
}

// healthcheck asks the program that listens at an address whether it is well. It does
// not verify who answers: there is nothing to learn from the question.
func healthcheck(ctx context.Context, a address, stdout, stderr io.Writer) int {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var dialer net.Dialer
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, a.network, a.addr)
		},
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
	u := &url.URL{Scheme: "http", Host: "localhost", Path: "/-/healthy"}
	if a.tls {
		u.Scheme = "https"
	}
	resp, err := client.Do((&http.Request{Method: "GET", URL: u}).WithContext(ctx))
	if err == nil {
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			fmt.Fprintln(stdout, "healthy")
			return 0
		}
		err = fmt.Errorf("it answered %s", resp.Status)
	}
	fmt.Fprintf(stderr, "reverse_exporter: no healthy program at %s: %v; give --healthcheck the same --web.* flags as the program\n", a.addr, withoutURL(err))
	return 1
}

// hashPassword prints the hash of the password in the first line of standard input,
// stretched for about a quarter of a second.
func hashPassword(stdin io.Reader, stdout, stderr io.Writer) int {
	if file, ok := stdin.(*os.File); ok {
		if info, err := file.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			fmt.Fprint(stderr, "Password (it will be seen): ")
		}
	}
	line, err := bufio.NewReader(io.LimitReader(stdin, 4<<10)).ReadString('\n')
	password := strings.TrimRight(line, "\r\n")
	if err != nil && err != io.EOF || password == "" || len(line) == 4<<10 {
		fmt.Fprintln(stderr, "reverse_exporter: --hash-password reads one line, the password, from standard input")
		return 1
	}
	fastest := time.Hour
	for range 5 { // others may take the processor in between
		begin := time.Now()
		stretch(password, make([]byte, 16), minIterations)
		fastest = min(fastest, time.Since(begin))
	}
	quarter := minIterations * float64(250*time.Millisecond) / float64(fastest)
	iterations := int(min(max(quarter, minIterations), maxIterations)) / 1000 * 1000
	fmt.Fprintf(stdout, "%s\n", appendHash(nil, password, iterations))
	return 0
}

// appendHash appends the hash of a password.
func appendHash(dst []byte, password string, iterations int) []byte {
	salt := make([]byte, 16)
	rand.Read(salt)
	key := stretch(password, salt, iterations)
	return fmt.Appendf(dst, "pbkdf2-sha256$%d$%s$%s", iterations, base64.RawStdEncoding.EncodeToString(salt), base64.RawStdEncoding.EncodeToString(key))
}
