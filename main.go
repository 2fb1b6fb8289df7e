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
	"compress/flate"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"html"
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
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
)

// version is set by the linker.
var version = "dev"

const usage = `reverse_exporter turns many Prometheus exporters, .prom files and scripts into
one scrape target: one port, one /metrics, told apart by the label exporter_name.

Examples:
  reverse_exporter --http node=http://localhost:9100/metrics --http pg=http://localhost:9187/metrics
  reverse_exporter --file backup='/var/lib/metrics/*.prom' --exec certs='/usr/local/bin/certs --days 30'
  reverse_exporter --exec smart='smart.sh {disk=sda|sdb}' --timeout smart:30s --max-age smart:5m
  reverse_exporter --once --http node=http://localhost:9100/metrics
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
  --raw NAME,...               do not add exporter_name
  --require NAME,...           answer 503 when one of these is down

Server:
  --web.listen-address ADDR    :9998, 127.0.0.1:9998, unix:/run/re.sock; repeatable (:9998)
  --log.level LEVEL            debug, info, warn or error (info)
  --log.format FORMAT          logfmt or json, on standard error (logfmt)

Modes:
  --once                  print the merged metrics and exit; 1 if a source is down
  --check                 validate the flags and the files they name, and exit
  --version, --help
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := run(ctx, os.Args, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is the program: it returns the exit status, which is 0, 1 for what went
// wrong, or 2 for flags that are wrong.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
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
	if os.Getpid() == 1 && c.hasCommands() {
		return asInit(args, stderr)
	}
	life, end := context.WithCancel(context.Background())
	p := newProgram(life, c, stderr)
	defer func() {
		end()
		p.waitForRuns(time.Second)
	}()
	switch {
	case c.check:
		return p.check(stdout)
	case c.once:
		return p.once(ctx, stdout)
	}
	return p.serve(ctx)
}

// waitForRuns waits until all fetches have ended and their commands are killed,
// or d has passed: what hangs in the kernel is left to it.
func (p *program) waitForRuns(d time.Duration) {
	ended := make(chan struct{})
	go func() {
		for _, s := range p.sources {
			s.runs.Wait()
		}
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(d):
	}
}

// asInit runs the program as a child of itself.
func asInit(args []string, stderr io.Writer) int {
	path, err := os.Executable()
	if err != nil { // there is no /proc
		path = args[0]
	}
	code, err := supervise(path, args)
	if err != nil {
		fmt.Fprintln(stderr, "reverse_exporter:", err)
	}
	return code
}

// config is what the flags say.
type config struct {
	sources   []*source // in the order of the flags
	listen    []string
	logLevel  slog.Level
	logFormat string

	help, version, check, once bool
}

// hasCommands reports whether there is an exec source.
func (c *config) hasCommands() bool {
	return slices.ContainsFunc(c.sources, func(s *source) bool { return s.kind == "exec" })
}

// source is one part of the appliance, behind its waterfall.
type source struct {
	name     string
	kind     string // http, file or exec
	origin   string // where it comes from, without secrets
	maxBytes int64
	interval time.Duration
	paths    []string
	raw      bool
	require  bool
	added    addedLabels
	command  *command  // of an exec source
	exporter *exporter // of an http source
	pattern  string    // of a file source
	waterfall

	status status
}

// flags gathers what stands on the command line, and every fault in it.
type flags struct {
	config
	set    *flag.FlagSet
	given  map[string][]string // values by flag
	byName map[string]*source
	number int // of sources given, good or bad
	faults []string
}

// parseFlags turns a command line into what it says, and all that is wrong in
// it. A fault names the flag and the source but no value that may be secret.
func parseFlags(args []string) (*config, []string) {
	f := &flags{given: map[string][]string{}, byName: map[string]*source{}}
	f.set = flag.NewFlagSet("", flag.ContinueOnError)
	f.set.SetOutput(io.Discard)
	f.set.Usage = func() {}
	f.set.BoolVar(&f.help, "help", false, "")
	f.set.BoolVar(&f.help, "h", false, "")
	f.set.BoolVar(&f.version, "version", false, "")
	f.set.BoolVar(&f.check, "check", false, "")
	f.set.BoolVar(&f.once, "once", false, "")
	for _, kind := range []string{"http", "file", "exec"} {
		f.set.Func(kind, "", func(value string) error {
			f.addSource(kind, value)
			return nil
		})
	}
	for _, name := range []string{
		"label", "timeout", "max-bytes", "max-age", "interval", "path", "params", "raw", "require",
		"web.listen-address", "log.level", "log.format",
	} {
		f.set.Func(name, "", func(value string) error {
			f.given[name] = append(f.given[name], value)
			return nil
		})
	}
	f.readArgs(args)
	if f.help || f.version {
		return &f.config, nil
	}
	f.setOptions()
	f.checkTogether()
	f.setServer()
	if len(f.sources) == 0 && len(f.faults) == 0 {
		f.fault(`there is no source. For example:
  reverse_exporter --http node=http://localhost:9100/metrics
  reverse_exporter --file backup='/var/lib/metrics/*.prom' --exec certs=/usr/local/bin/certs`)
	}
	return &f.config, f.faults
}

// fault keeps what is wrong.
func (f *flags) fault(format string, args ...any) {
	f.faults = append(f.faults, fmt.Sprintf(format, args...))
}

// readArgs reads the command line, and goes on behind each fault.
func (f *flags) readArgs(args []string) {
	all := len(args)
	for len(args) > 0 {
		err := f.set.Parse(args)
		args = f.set.Args()
		switch {
		case err != nil && !strings.HasPrefix(err.Error(), "bad flag syntax"):
			f.fault("%v; see --help", strings.Replace(err.Error(), ": -", ": --", 1))
		case len(args) > 0:
			f.fault("argument %d is no flag; a value with blanks needs quotes", all-len(args)+1)
			args = args[1:]
		}
	}
}

// addSource adds the source of an --http, --file or --exec flag.
func (f *flags) addSource(kind, value string) {
	f.number++
	name, what, ok := strings.Cut(value, "=")
	if !ok || !isSourceName(name) {
		f.fault("--%s, source %d: NAME=%s is needed, with a NAME of letters, digits, _ . and - that begins with a letter or digit",
			kind, f.number, map[string]string{"http": "URL", "file": "PATTERN", "exec": "COMMAND"}[kind])
		return
	}
	if name == ownName {
		f.fault("--%s %s: this name is the program's own", kind, name)
	}
	if f.byName[name] != nil {
		f.fault("--%s %s: another source has this name", kind, name)
		return
	}
	s := &source{name: name, kind: kind, paths: []string{"/metrics"}}
	f.byName[name] = s
	f.sources = append(f.sources, s)
	var err error
	switch kind {
	case "http":
		err = s.setURL(what)
	case "file":
		err = s.setPattern(what)
	case "exec":
		err = s.setCommand(what)
	}
	if err != nil {
		f.fault("--%s %s: %v", kind, name, err)
	}
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
			f.fault("--%s %s=: a colon belongs behind the name, write --%s %s:%s", option, wrong, option, wrong, strings.TrimPrefix(given, wrong+"="))
		case named:
			f.fault("--%s: a NAME: is needed in front", option)
		default:
			general = append(general, scoped{f.sources, "", given})
		}
	}
	return append(general, specific...)
}

// each sets an option at the sources that its values are for. A source can have
// one value, and the order of flags does not matter: two that differ are a fault.
func (f *flags) each(option string, named bool, set func(s *source, value string) error) {
	first := map[string]string{}
	for _, v := range f.values(option, named) {
		shown := strings.TrimPrefix(v.name+":"+v.value, ":")
		if other, ok := first[v.name]; ok && other != v.value {
			f.fault("--%s %s: given twice, with different values", option, shown)
		}
		first[v.name] = v.value
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
		s.interval, err = parseDuration(value, true)
		return err
	})
	f.each("params", true, func(s *source, value string) error {
		if s.exporter == nil {
			return errors.New("only an http source has parameters; a command takes {x}")
		}
		s.exporter.params = strings.Split(value, ",")
		return nil
	})
	f.names("raw", func(s *source) { s.raw = true })
	f.names("require", func(s *source) { s.require = true })
	f.setPaths()
	f.setLabels()
}

// setPaths gives the sources their endpoints: their own, or else the general ones.
func (f *flags) setPaths() {
	named := map[*source]bool{}
	general := false
	for _, v := range f.values("path", false) {
		if err := checkPath(v.value); err != nil {
			f.fault("--path %s: %v", v.value, err)
			continue
		}
		for _, s := range v.sources {
			if v.name != "" && !named[s] || v.name == "" && !general {
				s.paths = nil
			}
			named[s] = v.name != ""
			if !slices.Contains(s.paths, v.value) {
				s.paths = append(s.paths, v.value)
			}
		}
		general = true
	}
}

// checkPath says why a path cannot be an endpoint.
func checkPath(path string) error {
	switch {
	case !strings.HasPrefix(path, "/"):
		return errors.New("a path begins with /")
	case path == "/", path == "/-", strings.HasPrefix(path, "/-/"):
		return errors.New("this path is the program's own")
	case strings.HasSuffix(path, "/"), strings.Contains(path, "//"), strings.ContainsAny(path, "?#%\\"),
		strings.ContainsFunc(path, func(c rune) bool { return c <= ' ' || c > '~' }):
		return errors.New("a path has plain characters, no ? # % or \\, and no / at its end")
	}
	return nil
}

// setLabels gives the sources the labels that they add.
func (f *flags) setLabels() {
	own := map[*source]map[string]string{}
	for _, s := range f.sources {
		own[s] = map[string]string{}
	}
	first := map[string]string{}
	for _, v := range f.values("label", false) {
		key, value, err := parseLabel(v.value)
		if err != nil {
			f.fault("--label %s: %v", v.value, err)
			continue
		}
		if other, ok := first[v.name+":"+key]; ok && other != value {
			f.fault("--label %s: given twice, with different values", v.value)
		}
		first[v.name+":"+key] = value
		for _, s := range v.sources {
			own[s][key] = value
		}
	}
	for _, s := range f.sources {
		if !s.raw {
			s.added.add("exporter_name", s.name)
			s.added.telling = true
		}
		for _, key := range slices.Sorted(maps.Keys(own[s])) {
			s.added.add(key, own[s][key])
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
	case err != nil || err2 != nil || n < 0 || d < 0 || !(total < math.MaxInt64):
		return 0, errors.New("a duration is needed, as 500ms, 10s, 5m, 1h30m or 2d")
	case positive && total == 0:
		return 0, errors.New("the duration must be longer than 0")
	}
	return time.Duration(total), nil
}

// parseSize parses a whole number with its unit.
func parseSize(text string) (int64, error) {
	units := []struct {
		name  string
		bytes int64
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"B", 1}}
	for _, u := range units {
		if number, ok := strings.CutSuffix(text, u.name); ok {
			n, err := strconv.ParseUint(number, 10, 31)
			if err != nil || n == 0 {
				break
			}
			if int64(n) > 1<<30/u.bytes {
				return 0, errors.New("1GiB is the most")
			}
			return int64(n) * u.bytes, nil
		}
	}
	return 0, errors.New("a whole number with B, KiB, MiB or GiB is needed, as 32MiB")
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
	f.listen = f.given["web.listen-address"]
	if len(f.listen) == 0 {
		f.listen = []string{":9998"}
	}
	for i, addr := range f.listen {
		if slices.Contains(f.listen[:i], addr) {
			f.fault("--web.listen-address %s: given twice", addr)
		}
		if _, _, err := splitListen(addr); err != nil {
			f.fault("--web.listen-address %s: %v", addr, err)
		}
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

// splitListen returns the network and the address to listen on.
func splitListen(addr string) (network, address string, err error) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		if path == "" {
			err = errors.New("a path is needed, as unix:/run/re.sock")
		}
		return "unix", path, err
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil || !isPort(port, false) {
		err = errors.New("an address is needed, as :9998, 127.0.0.1:9998 or unix:/run/re.sock")
	}
	return "tcp", addr, err
}

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
func (s *source) fetchCommand(ctx context.Context, values []string) *result {
	r := &result{start: time.Now()}
	out, failure := s.command.run(ctx, values, s.timeout, s.maxBytes)
	if r.failure = failure; failure == nil {
		r.failure = s.readBody(ctx, r, bytes.NewReader(out), endsOpenMetrics(out))
	}
	r.end = time.Now()
	return r
}

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
func (s *source) fetchFiles(ctx context.Context, _ []string) *result {
	r := &result{start: time.Now()}
	names, _ := filepath.Glob(s.pattern)
	if len(names) == 0 && !hasMeta(s.pattern) {
		names = []string{s.pattern}
	}
	for _, name := range names {
		if f := s.readFile(ctx, r, name); f != nil && r.failure == nil {
			r.failure = f
		}
	}
	for _, e := range r.bodies {
		e.telling = e.telling && len(r.bodies) == 1
	}
	r.end = time.Now()
	return r
}

// hasMeta reports whether a pattern is more than the name of one file.
func hasMeta(pattern string) bool { return strings.ContainsAny(pattern, `*?[\`) }

// readFile adds one file to a result. It waits for no writer of a FIFO, and
// takes nothing of a file that changes while it is read.
func (s *source) readFile(ctx context.Context, r *result, name string) *failure {
	before, err := os.Stat(name) // to open a device may do something
	if err == nil && !before.Mode().IsRegular() {
		return fail("file", "%s is no regular file", name)
	}
	file, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return &failure{reason: "file", err: err}
	}
	defer file.Close()
	if before, err = file.Stat(); err != nil || !before.Mode().IsRegular() {
		return fail("file", "%s is no regular file", name)
	}
	r.files = append(r.files, fileTime{name, before.ModTime()})
	bodies := len(r.bodies)
	if f := s.readBody(ctx, r, file, endsOpenMetrics(readEnd(file, before.Size()))); f != nil {
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

// readEnd returns the last bytes of a file, enough to see its last line if that is
// short.
func readEnd(file *os.File, size int64) []byte {
	end := make([]byte, min(size, 8))
	n, _ := file.ReadAt(end, size-int64(len(end)))
	return end[:n]
}

// endsOpenMetrics reports whether the last line of a body is # EOF, which makes it
// OpenMetrics where no header tells.
func endsOpenMetrics(body []byte) bool {
	line := bytes.TrimSuffix(body, []byte("\n"))
	return bytes.HasSuffix(line, []byte("# EOF")) && (len(line) == 5 || line[len(line)-6] == '\n')
}

// exporter is what an http source fetches from.
type exporter struct {
	url    *url.URL
	params []string // URL parameters that are handed on, * for all
	client http.Client
}

// accept asks for the text format. Some exporters answer 406 without it.
const accept = "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"

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
	s.exporter = &exporter{url: u, client: newClient(socket)}
	s.places, s.fetch = 128, s.fetchHTTP
	return nil
}

// parseURL parses a URL, or what nginx writes for one at a Unix socket.
func parseURL(text string) (u *url.URL, socket string, err error) {
	socket, isSocket := strings.CutPrefix(text, "http://unix:")
	if isSocket {
		var path string
		socket, path, _ = strings.Cut(socket, ":")
		text = "http://localhost" + path
	} else {
		socket = ""
	}
	u, err = url.Parse(text)
	switch {
	case err != nil:
		return nil, "", errors.New("this is no URL")
	case u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || !isPort(u.Port(), true) || isSocket && socket == "":
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

// newClient returns a client for one exporter, which may be at a Unix socket. It
// takes no proxy from the environment.
func newClient(socket string) http.Client {
	var dialer net.Dialer
	return http.Client{
		CheckRedirect: stayThere,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if socket != "" {
					network, addr = "unix", socket
				}
				return dialer.DialContext(ctx, network, addr)
			},
			DisableCompression:     true, // it would hide that the body was compressed
			MaxResponseHeaderBytes: 64 << 10,
			MaxIdleConnsPerHost:    2,
			IdleConnTimeout:        5 * time.Minute,
			ReadBufferSize:         64 << 10,
		},
	}
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

// fetchHTTP scrapes the exporter, with the query in values beside its own.
func (s *source) fetchHTTP(ctx context.Context, values []string) *result {
	r := &result{start: time.Now()}
	r.failure = s.scrapeHTTP(ctx, r, values)
	if r.failure != nil && ctx.Err() == context.DeadlineExceeded {
		r.failure = fail("timeout", "no whole answer within %v, see --timeout", s.timeout)
	}
	r.end = time.Now()
	return r
}

// scrapeHTTP adds what the exporter answers to a result.
func (s *source) scrapeHTTP(ctx context.Context, r *result, values []string) *failure {
	u := *s.exporter.url
	u.RawQuery = strings.Trim(u.RawQuery+"&"+strings.Join(values, ""), "&")
	req := (&http.Request{Method: "GET", URL: &u, Header: http.Header{
		"Accept":          {accept},
		"Accept-Encoding": {"identity"},
		"User-Agent":      {"reverse_exporter/" + version},
		timeoutHeader:     {strconv.FormatFloat((s.timeout - margin(s.timeout)).Seconds(), 'f', -1, 64)},
	}}).WithContext(ctx)
	resp, err := s.exporter.client.Do(req)
	if err != nil {
		return httpFailure(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fail("status", "the exporter answered %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	}
	openMetrics, f := checkContentType(resp.Header.Get("Content-Type"))
	if f != nil {
		return f
	}
	var body io.Reader = resp.Body
	if resp.ContentLength < 0 && len(resp.TransferEncoding) == 0 {
		body = &untilClose{src: body}
	}
	switch encoding := strings.ToLower(resp.Header.Get("Content-Encoding")); encoding {
	case "", "identity":
	case "gzip":
		if body, err = gzip.NewReader(resp.Body); err != nil { // which has an end of its own
			return readFailure(err)
		}
	default:
		return fail("encoding", "the body has a Content-Encoding that was not asked for")
	}
	return s.readBody(ctx, r, body, openMetrics)
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
func httpFailure(err error) *failure {
	var withURL *url.Error
	if errors.As(err, &withURL) {
		err = withURL.Err
	}
	var op *net.OpError
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var alert tls.AlertError
	switch {
	case errors.Is(err, errRedirect), errors.Is(err, errRedirects):
		return &failure{reason: "status", err: err}
	case errors.Is(err, http.ErrSchemeMismatch), errors.As(err, &record):
		return fail("tls", "the exporter does not speak TLS")
	case errors.As(err, &cert), errors.As(err, &alert):
		return &failure{reason: "tls", err: err}
	case errors.As(err, &op) && op.Op == "dial":
		return &failure{reason: "connect", err: err}
	case errors.As(err, &op), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fail("read", "failed to read the answer: %w", err)
	}
	return fail("read", "the answer is no valid HTTP, or its headers are too long")
}

// untilClose reads a body that nothing but the end of the connection ends: only
// its last newline tells that it was not cut short.
type untilClose struct {
	src  io.Reader
	last byte
}

func (u *untilClose) Read(p []byte) (int, error) {
	n, err := u.src.Read(p)
	if n > 0 {
		u.last = p[n-1]
	}
	if err == io.EOF && u.last != '\n' && u.last != 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// body reads what a source delivers: it counts, and ends at its limit or when
// its context is done.
type body struct {
	ctx      context.Context
	src      io.Reader
	n, limit int64
}

func (b *body) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := b.src.Read(p)
	if b.n += int64(n); b.n > b.limit {
		return 0, errTooLarge
	}
	return n, err
}

// readBody reads one more body into a result.
func (s *source) readBody(ctx context.Context, r *result, src io.Reader, openMetrics bool) *failure {
	in := &body{ctx: ctx, src: src, limit: s.maxBytes - r.bytes}
	budget := min(4*s.maxBytes, math.MaxUint32, math.MaxInt)
	for _, e := range r.bodies {
		budget -= int64(e.held())
	}
	e, err := read(in, openMetrics, &s.added, nil, int(budget))
	r.bytes += in.n
	switch {
	case err == nil:
		r.bodies = append(r.bodies, e)
		return nil
	case ctx.Err() != nil:
		return fail("timeout", "not read within %v, see --timeout", s.timeout)
	}
	return readFailure(err)
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

// status is what a source's fetches came to, for the metrics, the log and the
// page at /.
type status struct {
	mu sync.Mutex // guards all below
	counts

	told     string    // the state that the log knows: "", "up" or a reason
	toldTime time.Time // when it was told
}

// reasons are those that a kind of source can fail for.
var reasons = map[string][]string{
	"http": {"busy", "connect", "content_type", "encoding", "internal", "parse", "read", "status", "timeout", "tls", "too_large"},
	"file": {"busy", "file", "internal", "parse", "read", "timeout", "too_large"},
	"exec": {"busy", "exit", "internal", "parse", "start", "timeout", "too_large"},
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

// counts is a part of a status.
type counts struct {
	fetches     uint64
	failures    map[string]uint64 // by reason
	lastSuccess time.Time
}

// copy returns what was counted.
func (st *status) copy() counts {
	st.mu.Lock()
	defer st.mu.Unlock()
	c := st.counts
	c.failures = maps.Clone(c.failures)
	return c
}

// fail counts a failure. The caller holds mu.
func (st *status) fail(reason string) {
	if st.failures == nil {
		st.failures = map[string]uint64{}
	}
	st.failures[reason]++
}

// busy counts a scrape that found no place, or spent its time in line.
func (s *source) busy() {
	s.status.mu.Lock()
	defer s.status.mu.Unlock()
	s.status.fail("busy")
}

// program is what runs once the flags are understood.
type program struct {
	*config
	log       *slog.Logger
	endpoints map[string][]*source // by path
	started   time.Time
	pages     pages

	toldMu sync.Mutex // guards told
	told   map[string]bool
}

// newProgram puts the parts together. Its fetches end with life.
func newProgram(life context.Context, c *config, stderr io.Writer) *program {
	options := &slog.HandlerOptions{Level: c.logLevel}
	p := &program{config: c, endpoints: map[string][]*source{}, started: time.Now(), told: map[string]bool{}}
	p.log = slog.New(slog.NewTextHandler(stderr, options))
	if c.logFormat == "json" {
		p.log = slog.New(slog.NewJSONHandler(stderr, options))
	}
	for _, s := range c.sources {
		s.life = life
		s.pinned = s.interval > 0
		s.count = func(standard bool, r *result) func() { return p.count(s, standard, r) }
		for _, path := range s.paths {
			p.endpoints[path] = append(p.endpoints[path], s)
		}
	}
	return p
}

// check looks at the files that the flags name.
func (p *program) check(stdout io.Writer) int {
	code := 0
	for _, s := range p.sources {
		var err error
		if s.command != nil {
			_, err = exec.LookPath(s.origin)
		} else if s.kind == "file" && !hasMeta(s.pattern) {
			var info os.FileInfo
			if info, err = os.Stat(s.pattern); err == nil && !info.Mode().IsRegular() {
				err = fmt.Errorf("%s is no regular file", s.pattern)
			}
		}
		if err != nil {
			fmt.Fprintf(stdout, "--%s %s: %v\n", s.kind, s.name, err)
			code = 1
		}
	}
	if code == 0 {
		fmt.Fprintln(stdout, "all is fine")
	}
	return code
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
	ctx, cancel := context.WithTimeout(ctx, p.patience(sources, ""))
	defer cancel()
	results := p.await(ctx, shares)
	pg := p.render(sources, results, false)
	code := 0
	for _, chunk := range pg.chunks {
		if _, err := stdout.Write(chunk); err != nil {
			p.log.Error("failed to print", "err", err)
			return 1
		}
	}
	for _, r := range results {
		if r.failure != nil {
			code = 1
		}
	}
	return code
}

// serve listens and answers until ctx is done, then lets running scrapes end.
func (p *program) serve(ctx context.Context) int {
	server := &http.Server{
		Handler:           p,
		ReadHeaderTimeout: 10 * time.Second,
		WriteTimeout:      10 * time.Second, // send renews it
		IdleTimeout:       5 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
	failed := make(chan error, len(p.listen))
	for _, addr := range p.listen {
		network, address, _ := splitListen(addr)
		l, err := net.Listen(network, address)
		if err != nil {
			p.log.Error("failed to listen", "address", addr, "err", err)
			return 1
		}
		p.log.Info("listening", "address", l.Addr().String())
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

// ServeHTTP answers one request.
func (p *program) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD are answered", http.StatusMethodNotAllowed)
		return
	}
	sources, ok := p.endpoints[r.URL.Path]
	switch {
	case ok:
		p.scrape(w, r, sources)
	case r.URL.Path == "/":
		p.index(w)
	case r.URL.Path == "/-/healthy", r.URL.Path == "/-/ready":
		io.WriteString(w, "OK\n")
	default:
		http.Error(w, "there is nothing at this path; / lists the endpoints", http.StatusNotFound)
	}
}

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
	ctx, cancel := context.WithTimeout(r.Context(), p.patience(sources, r.Header.Get(timeoutHeader)))
	defer cancel()
	results := p.await(ctx, shares)
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(10 * time.Second)) // from now on
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the client has left; nothing would look like an empty page
	}
	if down := required(sources, results); len(down) > 0 {
		http.Error(w, "down: "+strings.Join(down, ", "), http.StatusServiceUnavailable)
		return
	}
	quoted := acceptsQuotes(r.Header.Values("Accept")) && slices.ContainsFunc(results, (*result).quoted)
	shared := p.pages.open(sources, results, quoted, func() *page { return p.render(sources, results, quoted) })
	defer p.pages.close(shared)
	p.send(w, r, shared)
}

// selected returns the sources of the names in their order, nil if a name is
// none of theirs.
func selected(sources []*source, names []string) []*source {
	for _, name := range names {
		if !slices.ContainsFunc(sources, func(s *source) bool { return s.name == name }) {
			return nil
		}
	}
	var found []*source
	for _, s := range sources {
		if slices.Contains(names, s.name) {
			found = append(found, s)
		}
	}
	return found
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

// timeoutHeader tells how long a scraper waits, in seconds.
const timeoutHeader = "X-Prometheus-Scrape-Timeout-Seconds"

// margin is how much earlier than a deadline an answer should be under way.
func margin(d time.Duration) time.Duration {
	return min(d/10, 500*time.Millisecond)
}

// patience is how long a scrape may take. Without a deadline of the scraper's it
// is what a run under way and one of its own may take.
func (p *program) patience(sources []*source, header string) time.Duration {
	var longest time.Duration
	for _, s := range sources {
		longest = max(longest, s.timeout)
	}
	seconds, err := strconv.ParseFloat(header, 64)
	if err != nil || !(seconds > 0) || seconds > 1e6 {
		return 2 * longest
	}
	d := time.Duration(seconds * float64(time.Second))
	if longest > d {
		p.tellOnce("", "a --timeout is longer than the deadline that a scraper announces", "timeout", longest, "deadline", d)
	}
	return d - margin(d)
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

// await waits for all shares until ctx is done, and takes what is there. What
// the sources hold until then is not held by the scrape.
func (p *program) await(ctx context.Context, shares []share) []*result {
	for _, sh := range shares {
		if sh.ticket != nil {
			sh.source.wait(ctx, sh.ticket)
		}
	}
	late := ctx.Err() == context.DeadlineExceeded
	results := make([]*result, len(shares))
	for i, sh := range shares {
		results[i] = refused
		if sh.ticket != nil {
			results[i] = sh.source.take(sh.ticket)
			sh.source.leave(sh.ticket, late)
		}
		if results[i] == refused || results[i] == crowded && late {
			sh.source.busy()
		}
	}
	return results
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

// pages shares the page of scrapes that would render the same.
type pages struct {
	mu    sync.Mutex // guards all below, and the readers of each page
	alive []*sharedPage
}

// maxPages is how many pages may be alive at once.
const maxPages = 8

// sharedPage is a page, plain and compressed, and those who read it.
type sharedPage struct {
	sources []*source
	results []*result
	quoted  bool // names that need quotes have them, not underscores
	readers int
	ctx     context.Context // done when its readers are to be cut off
	cut     context.CancelFunc

	once   sync.Once
	page   *page
	zipped func() []byte
}

// open returns the page of results, which render makes if nobody has it yet.
// When too many are alive, the readers of the oldest are cut off.
func (ps *pages) open(sources []*source, results []*result, quoted bool, render func() *page) *sharedPage {
	ps.mu.Lock()
	i := slices.IndexFunc(ps.alive, func(sp *sharedPage) bool {
		return sp.quoted == quoted && slices.Equal(sp.sources, sources) && slices.Equal(sp.results, results)
	})
	if i < 0 {
		if len(ps.alive) == maxPages {
			ps.alive[0].cut()
			ps.alive = slices.Delete(ps.alive, 0, 1)
		}
		i = len(ps.alive)
		sp := &sharedPage{sources: sources, results: results, quoted: quoted}
		sp.ctx, sp.cut = context.WithCancel(context.Background())
		sp.zipped = sync.OnceValue(func() []byte { return zip(sp.page) })
		ps.alive = append(ps.alive, sp)
	}
	sp := ps.alive[i]
	sp.readers++
	ps.mu.Unlock()

	sp.once.Do(func() { sp.page = render() })
	return sp
}

// close gives a page back. It is dropped with its last reader.
func (ps *pages) close(sp *sharedPage) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if sp.readers--; sp.readers == 0 {
		sp.cut()
		ps.alive = slices.DeleteFunc(ps.alive, func(other *sharedPage) bool { return other == sp })
	}
}

// zip compresses a page.
func zip(pg *page) []byte {
	var out bytes.Buffer
	z, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	for _, chunk := range pg.chunks {
		z.Write(chunk)
	}
	z.Close()
	return out.Bytes()
}

// send writes a page to a scraper, which has to take 256 KiB every 10 s.
func (p *program) send(w http.ResponseWriter, r *http.Request, sp *sharedPage) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	if sp.quoted {
		h.Set("Content-Type", "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8")
	}
	h.Set("Vary", "Accept, Accept-Encoding")
	chunks, size := sp.page.chunks, sp.page.size
	if acceptsGzip(r.Header.Values("Accept-Encoding")) {
		zipped := sp.zipped()
		chunks, size = [][]byte{zipped}, len(zipped)
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("Content-Length", strconv.Itoa(size))
	if r.Method == http.MethodHead {
		return
	}
	out := &pacer{w: w, control: http.NewResponseController(w), page: sp.ctx}
	stop := context.AfterFunc(sp.ctx, func() { out.control.SetWriteDeadline(time.Now()) })
	defer stop()
	buffered := bufio.NewWriterSize(out, 32<<10)
	for _, chunk := range chunks {
		buffered.Write(chunk)
	}
	if err := buffered.Flush(); err != nil {
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

// acceptsGzip reads Accept-Encoding (RFC 9110, 12.5.3).
func acceptsGzip(headers []string) bool {
	weight := -1.0 // of gzip, or else of *
	for item := range strings.SplitSeq(strings.Join(headers, ","), ",") {
		coding, params, _ := strings.Cut(item, ";")
		coding = strings.ToLower(strings.TrimSpace(coding))
		if coding != "gzip" && coding != "x-gzip" && (coding != "*" || weight >= 0) {
			continue
		}
		weight = 1
		if q, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(params)), "q="); ok {
			weight, _ = strconv.ParseFloat(q, 64)
		}
	}
	return weight > 0
}

// acceptsQuotes reads Accept: whether a text format with quoted names is welcome.
func acceptsQuotes(headers []string) bool {
	plain := strings.NewReplacer(" ", "", "\t", "", `"`, "").Replace(strings.ToLower(strings.Join(headers, ",")))
	for item := range strings.SplitSeq(plain, ",") {
		params := strings.Split(item, ";")
		refused := slices.ContainsFunc(params, func(param string) bool {
			q, ok := strings.CutPrefix(param, "q=")
			weight, err := strconv.ParseFloat(q, 64)
			return ok && (err != nil || !(weight > 0))
		})
		if params[0] == "text/plain" && slices.Contains(params, "escaping=allow-utf-8") && !refused {
			return true
		}
	}
	return false
}

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
		own, err := read(bytes.NewReader(p.appendStatus(nil, sources, results, conflicts, duplicates)), false, &addedLabels{}, nil, math.MaxInt32)
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
			p.tellOnce(name, "sources without a telling label have the same series: the first is served", "family", name)
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
		m.buf = append(appendEscaped(m.buf, strings.ToValidUTF8(pairs[i+1], "\uFFFD")), '"')
	}
	m.buf = append(m.buf, "} "...)
	m.buf = append(strconv.AppendFloat(m.buf, value, 'g', -1, 64), '\n')
}

// appendStatus appends the status metrics of an endpoint's sources and of the
// program itself.
func (p *program) appendStatus(dst []byte, sources []*source, results []*result, conflicts, duplicates int) []byte {
	m := &metrics{buf: dst}
	each := func(family, metricType, help string, value func(s *source, r *result) (float64, bool)) {
		m.begin(ownName+"_"+family, metricType, help)
		for i, s := range sources {
			if v, ok := value(s, results[i]); ok {
				m.sample(v, "exporter_name", s.name)
			}
		}
	}
	each("source_up", "gauge", "Whether the source delivered for this scrape.", func(_ *source, r *result) (float64, bool) {
		return oneIf(r.failure == nil), true
	})
	each("source_scrape_duration_seconds", "gauge", "How long the fetch took.", func(_ *source, r *result) (float64, bool) {
		return r.end.Sub(r.start).Seconds(), !r.start.IsZero()
	})
	each("source_samples_scraped", "gauge", "Samples that the source delivered.", func(_ *source, r *result) (float64, bool) {
		return float64(r.samples()), true
	})
	each("source_body_bytes", "gauge", "Size of what the source delivered, decompressed.", func(_ *source, r *result) (float64, bool) {
		return float64(r.bytes), true
	})
	each("source_last_success_timestamp_seconds", "gauge", "When the last fetch succeeded.", func(s *source, _ *result) (float64, bool) {
		st := s.status.copy()
		return unixSeconds(st.lastSuccess), !st.lastSuccess.IsZero()
	})
	each("source_fetches_total", "counter", "Fetches that ended and were not abandoned by their scrapers.", func(s *source, _ *result) (float64, bool) {
		return float64(s.status.copy().fetches), true
	})
	m.begin(ownName+"_source_failures_total", "counter", "Failed fetches, and scrapes that found the source busy.")
	for _, s := range sources {
		st := s.status.copy()
		for _, reason := range reasons[s.kind] {
			m.sample(float64(st.failures[reason]), "exporter_name", s.name, "reason", reason)
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
	var virtual, resident float64
	statm, _ := os.ReadFile("/proc/self/statm")
	if n, _ := fmt.Sscan(string(statm), &virtual, &resident); n == 2 {
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

// index answers with what the appliance holds.
func (p *program) index(w http.ResponseWriter) {
	var b strings.Builder
	b.WriteString("<!doctype html><title>reverse_exporter</title><h1>reverse_exporter</h1><ul>")
	for _, path := range slices.Sorted(maps.Keys(p.endpoints)) {
		fmt.Fprintf(&b, `<li><a href="%s">/%[1]s</a>`, html.EscapeString(path[1:]))
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	io.WriteString(w, b.String()+"</ul>\n")
}
