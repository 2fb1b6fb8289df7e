package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unicode/utf8"
	"weak"
)

var update = flag.Bool("update", false, "rewrite testdata/format.txt and the want files of testdata/cases")

// TestMain runs the test binary as the program itself where a test asks for it, so that such tests are end to end.
func TestMain(m *testing.M) {
	if os.Getenv("RUN_AS_PROGRAM") != "" {
		main()
	}
	if path := os.Getenv("RUN_AS_INIT"); path != "" {
		ctx, stop := context.WithCancel(context.Background())
		stop() // by a signal that came before it listens
		code := supervise(ctx, path, []string{path, "60"}, os.Stderr)
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// programCommand runs the program in a folder, with further variables in its environment.
func programCommand(dir string, env []string, args ...string) *exec.Cmd {
	path, _ := filepath.Abs(os.Args[0])
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.Env = dir, append(append(os.Environ(), "RUN_AS_PROGRAM=1"), env...)
	return cmd
}

// syncBuffer is a buffer for what several goroutines write.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// eventually waits until something is so, and reports whether it was in time.
func eventually(so func() bool) bool {
	for end := time.Now().Add(10 * time.Second); !so(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// newTestProgram makes the program that flags stand for, in this process.
func newTestProgram(t testing.TB, args ...string) (*program, *syncBuffer) {
	t.Helper()
	if !slices.Contains(args, "--web.listen-address") {
		args = append(args, "--web.listen-address", "127.0.0.1:0")
	}
	c, faults := parseFlags(args)
	if len(faults) > 0 {
		t.Fatalf("flags %q: %q", args, faults)
	}
	life, end := context.WithCancel(context.Background())
	log := &syncBuffer{}
	p := newProgram(life, c, log)
	if err := p.loadFiles(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		end()
		for _, s := range p.sources {
			s.runs.Wait()
		}
	})
	return p, log
}

// get scrapes a path of the program.
func get(t testing.TB, p *program, path string, headers ...string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest("GET", path, nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	p.ServeHTTP(w, r)
	return w
}

// fetchOnce fetches a source, past its waterfall.
func fetchOnce(s *source) *result {
	standard, _ := s.arguments(nil, prometheus3)
	return s.guard(context.Background(), &fetch{key: &key{arguments: standard}, told: s.timeout})
}

// must returns a value that a test cannot do without.
func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// writeFile writes a file of a test and returns its path.
func writeFile(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	os.MkdirAll(filepath.Dir(path), 0o755)
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// replaceFile writes a file that is another one than that of this name before.
func replaceFile(t testing.TB, dir, name, text string) string {
	t.Helper()
	old := writeFile(t, dir, name+".new", text)
	path := filepath.Join(dir, name)
	if err := os.Rename(old, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// readFiles returns what files have, in order.
func readFiles(t testing.TB, files ...string) (bodies [][]byte) {
	t.Helper()
	for _, file := range files {
		bodies = append(bodies, must(os.ReadFile(file)))
	}
	return bodies
}

// exchange asks for a URL, and for no compression but that of the headers. It returns the
// head of the answer and the body, unzipped.
func exchange(config *tls.Config, method, url string, headers ...string) (head, body string, err error) {
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		return "", "", err
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ":")
		req.Header.Add(name, strings.TrimSpace(value))
	}
	transport := &http.Transport{DisableCompression: true, DisableKeepAlives: true, TLSClientConfig: config}
	client := http.Client{Timeout: time.Minute, Transport: transport}
	resp, err := client.Do(req)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	if resp.Header.Get("Content-Encoding") == "gzip" && method != "HEAD" {
		if resp.Body, err = gzip.NewReader(resp.Body); err != nil {
			return "", "", err
		}
	}
	dump, _ := httputil.DumpResponse(resp, false)
	text, err := io.ReadAll(resp.Body)
	return strings.ReplaceAll(string(dump), "\r\n", "\n"), string(text), err
}

func httpGet(t testing.TB, url string) string {
	t.Helper()
	_, body, err := exchange(nil, "GET", url, "Accept-Encoding: gzip")
	if err != nil {
		t.Error(err)
	}
	return body
}

// wantContains fails unless text has all of the parts.
func wantContains(t testing.TB, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q is not in:\n%s", part, text)
		}
	}
}

// wantFile wants what a file has, and shows the first line that differs and what follows.
func wantFile(t *testing.T, name, got string) {
	t.Helper()
	if *update {
		writeFile(t, ".", name, got)
	}
	want, same := string(readFiles(t, name)[0]), 0
	for same < min(len(got), len(want)) && got[same] == want[same] {
		same++
	}
	if got != want {
		from := strings.LastIndexByte(got[:same], '\n') + 1
		line := strings.Count(got[:from], "\n") + 1
		t.Errorf("%s:%d: got:\n%.2000s\nwant:\n%.2000s", name, line, got[from:], want[from:])
	}
}

// glob returns the files that a test is about.
func glob(t testing.TB, pattern string) []string {
	t.Helper()
	files, _ := filepath.Glob(pattern)
	if len(files) == 0 {
		t.Fatalf("there is no %s", pattern)
	}
	return files
}

// alive returns how many processes have the marker in their command line.
func alive(t *testing.T, marker string) (n int) {
	t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	if len(files) == 0 {
		t.Skip("there is no /proc to look for processes in")
	}
	for _, file := range files {
		text, _ := os.ReadFile(file)
		status, _ := os.ReadFile(filepath.Dir(file) + "/stat")
		if strings.Contains(string(text), marker) && !strings.Contains(string(status), ") Z ") {
			n++
		}
	}
	return n
}

// childrenOf lists the children of a process, zombies too.
func childrenOf(t testing.TB, pid int) (children []int) {
	t.Helper()
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		text, _ := os.ReadFile(file)
		_, rest, _ := strings.Cut(string(text), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == strconv.Itoa(pid) {
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			children = append(children, child)
		}
	}
	return children
}

const backup = "--file=backup=testdata/appliance/backup.prom"

// answer is what an exporter answers to all.
type answer string

func (a answer) ServeHTTP(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, string(a)) }

// askedContext has a test answer whether it is done.
type askedContext struct {
	context.Context
	answer func() error
}

func (c askedContext) Err() error { return c.answer() }

// ---- Scripts

// TestScript runs the scripts of testdata/script, each in a folder of its own. A script
// begins with a comment that says what it tests, and ends with files: a line "-- NAME --"
// is above each. README lists the lines between: do runs commands, holds the checks.
func TestScript(t *testing.T) {
	for _, file := range glob(t, "testdata/script/*.txt") {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			s := &script{T: t, dir: t.TempDir(), program: &started{}}
			testdata, _ := filepath.Abs("testdata")
			self, _ := filepath.Abs(os.Args[0])
			s.names = []string{"$WORK", s.dir, "$TESTDATA", testdata, "$PROGRAM", "env RUN_AS_PROGRAM=1 " + self}
			for i, line := range append(s.unpack(file), "stop") {
				if err := s.do(strings.NewReplacer(s.names...).Replace(line)); err != nil || t.Failed() {
					t.Fatalf("%s:%d: %s: %v\noutput:\n%s\nlog:\n%s", file, i+1, line, err, s.out, &s.program.log)
				}
			}
		})
	}
}

// script is a script under way.
type script struct {
	*testing.T
	dir     string
	names   []string   // each with what takes its place
	env     []string   // of programs
	program *started   // the last one
	running []*started // the programs that listen
	out     string     // the last output or answer
	code    int        // the last exit status, until it is checked
	faults  []string   // of the last flags, those that are not checked yet
	ca      *authority // the last one
}

// unpack writes the files of a script and returns its lines.
func (s *script) unpack(file string) []string {
	text, err := os.ReadFile(file)
	if err != nil || !bytes.HasPrefix(text, []byte("# ")) {
		s.Fatalf("%s does not begin with a comment (%v)", file, err)
	}
	parts := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n-- ")
	syscall.ForkLock.RLock() // a file cannot be run while a process that is being started has it open for writing
	defer syscall.ForkLock.RUnlock()
	for _, part := range parts[1:] {
		name, body, _ := strings.Cut(part+"\n", " --\n")
		writeFile(s, s.dir, name, body)
	}
	return strings.Split(parts[0], "\n")
}

func (s *script) do(line string) (err error) {
	verb, text, _ := strings.Cut(line, " ")
	words, _ := splitWords(text)
	if s.code != 0 && verb != "exit" && verb != "fault" {
		return fmt.Errorf("the exit status %d before it or the faults %q are not checked", s.code, s.faults)
	}
	switch verb {
	case "", "#":
	case "reload":
		lines := func() int { return strings.Count(s.program.log.String(), "reload") }
		before := lines()
		s.program.Process.Signal(syscall.SIGHUP)
		if !eventually(func() bool { return lines() > before }) {
			err = errors.New("no changed file is taken up")
		}
	case "start":
		s.program = start(s, programCommand(s.dir, s.env, words...))
		s.running = append(s.running, s.program)
		addr, pid := s.program.addr, strconv.Itoa(s.program.Process.Pid)
		_, port, _ := net.SplitHostPort(addr)
		s.names = append([]string{"$URL", s.program.url, "$ADDR", addr, "$PORT", port, "$PID", pid}, s.names...)
	case "stop":
		for _, p := range s.running {
			err = errors.Join(err, p.stop())
			s.out = p.log.String()
		}
		s.running = nil
	case "run":
		s.program = newStarted(programCommand(s.dir, s.env, words...))
		s.run(s.program.Cmd)
		s.out += s.program.log.String()
		s.faults = strings.Split("\n"+s.out, "\nreverse_exporter: ")[1:]
	case "$":
		s.run(exec.Command("sh", "-ec", "exec 2>&1; cd "+s.dir+"\n"+text))
	case "GET", "HEAD", "POST", "PUT", "OPTIONS":
		s.ask(verb, words[0], words[1:])
	case "raw":
		err = s.raw(strings.ReplaceAll(s.read(text), "\n", "\r\n"))
	case "serve", "reset", "hang":
		s.serve(verb, words[0], words[1])
	case "ca":
		s.ca = newAuthority(s, s.dir, text)
	case "cert":
		s.ca.issue(s, s.dir, text)
	case "env":
		s.env = append(s.env, text)
	case "need":
		if s.run(exec.Command("sh", "-c", text)); s.code != 0 {
			s.Skip("this needs: " + text)
		}
	default:
		if text == "" || !s.holds(verb, text) {
			err = errors.New("this is not so, or there is no such line")
		}
	}
	return err
}

func (s *script) holds(check, text string) bool {
	first, rest, _ := strings.Cut(text, " ")
	switch check {
	case "has", "hasnot":
		return strings.Contains(s.out, text) == (check == "has")
	case "line":
		return strings.Contains("\n"+s.out, "\n"+text+"\n")
	case "count":
		return strconv.Itoa(strings.Count(s.out, rest)) == first
	case "status":
		return strings.HasPrefix(s.out, "HTTP/1.1 "+text+" ")
	case "log":
		return eventually(func() bool { return strings.Contains(s.program.log.String(), text) })
	case "alive":
		return eventually(func() bool { return strconv.Itoa(alive(s.T, rest)) == first })
	case "exit":
		defer func() { s.code = 0 }()
		return strconv.Itoa(s.code) == text
	case "fault":
		n, parts := len(s.faults), strings.Split(text, " … ")
		s.faults = slices.DeleteFunc(s.faults, func(fault string) bool {
			return !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(fault, part) })
		})
		if len(s.faults) == 0 && s.code == usageStatus {
			s.code = 0
		}
		return len(s.faults) == n-1
	}
	return false
}

// read returns what a file of the script holds.
func (s *script) read(name string) string {
	text, _ := os.ReadFile(filepath.Join(s.dir, name))
	return string(text)
}

// run runs a command to its end, with the last output as its input.
func (s *script) run(cmd *exec.Cmd) {
	cmd.Stdin = strings.NewReader(s.out)
	out, _ := cmd.Output()
	s.out, s.code = string(out), cmd.ProcessState.ExitCode()
}

func (s *script) ask(method, url string, headers []string) {
	head, body, err := exchange(s.ca.clientConfig(s.dir), method, url, headers...)
	if s.out = head + body; err != nil {
		s.out, s.code = err.Error(), 1
	} else if method == "GET" && strings.Contains(head, "\nContent-Type: text/plain; version=0.0.4;") {
		checkShape(s, body)
	}
}

// raw sends the program what need not be HTTP.
func (s *script) raw(request string) error {
	conn, err := net.Dial("tcp", s.program.addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(conn, request)
	answer, err := io.ReadAll(conn)
	s.out = strings.ReplaceAll(string(answer), "\r\n", "\n")
	return err
}

// serve answers requests to $name with a file, or one of a folder, and keeps them in name.asked.
func (s *script) serve(how, name, file string) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		request, _ := httputil.DumpRequest(r, false)
		writeFile(s, s.dir, name+".asked", s.read(name+".asked")+strings.ReplaceAll(string(request), "\r\n", "\n"))
		answer := cmp.Or(s.read(file), s.read(file+r.URL.Path))
		if head, body, ok := strings.Cut(answer, "\n\n"); ok {
			answer = strings.ReplaceAll(head, "\n", "\r\n") + "\r\n\r\n" + body
		}
		conn, _, _ := http.NewResponseController(w).Hijack()
		io.WriteString(conn, answer)
		switch how {
		case "reset":
			conn.(*net.TCPConn).SetLinger(0)
		case "hang":
			io.Copy(io.Discard, conn) // until the client leaves
		}
		conn.Close()
	}))
	s.Cleanup(server.Close)
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	start := server.Start
	if cert, err := tls.LoadX509KeyPair(s.dir+"/"+name+".pem", s.dir+"/"+name+".key"); err == nil {
		start = server.StartTLS
		server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: x509.NewCertPool()}
		if server.TLS.ClientCAs.AppendCertsFromPEM([]byte(s.read(name + ".clients"))) {
			server.TLS.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	start()
	s.names = append([]string{"$" + name, server.Listener.Addr().String()}, s.names...)
}

// started is a program in a process of its own.
type started struct {
	*exec.Cmd
	log       syncBuffer // its standard error
	addr, url string     // where it listens
}

// newStarted returns a command that will be started.
func newStarted(cmd *exec.Cmd) *started {
	s := &started{Cmd: cmd}
	s.Stderr = &s.log
	return s
}

// start starts the program, on a free port if its flags name no address, and waits until it listens.
func start(t testing.TB, cmd *exec.Cmd) *started {
	t.Helper()
	s := newStarted(cmd)
	if !strings.Contains(strings.Join(s.Args, " "), "--web.listen-address") {
		s.Args = append(s.Args, "--web.listen-address", "127.0.0.1:0")
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Process.Kill()
		s.Wait()
	})
	if !eventually(func() bool { return strings.Contains(s.log.String(), "msg=listening address=") }) {
		t.Fatalf("it does not listen:\n%s", &s.log)
	}
	_, line, _ := strings.Cut(s.log.String(), "msg=listening address=")
	s.addr = strings.Fields(line)[0]
	s.url = "http://" + s.addr
	if strings.HasPrefix(line, s.addr+" tls=true") {
		s.url = "https://" + s.addr
	}
	return s
}

// stop ends the program with SIGTERM.
func (s *started) stop() error {
	s.Process.Signal(syscall.SIGTERM)
	return s.Wait()
}

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newAuthority makes one up, and writes its certificate to NAME.pem.
func newAuthority(t testing.TB, dir, name string) *authority {
	a := &authority{}
	a.issue(t, dir, name)
	return a
}

// issue writes a certificate and its key to NAME.pem and NAME.key. The first that an authority issues is its own.
func (a *authority) issue(t testing.TB, dir, name string) (certFile, keyFile string) {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader))
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: name},
		NotAfter:     time.Now().Add(time.Hour),
		DNSNames:     []string{"localhost"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:         a.cert == nil, BasicConstraintsValid: true,
	}
	if a.cert == nil {
		cert.Subject.CommonName = "authority" // all have one name, so that clients show what another one signed
		a.cert, a.key = cert, key
	}
	signed := must(x509.CreateCertificate(cryptorand.Reader, cert, a.cert, &key.PublicKey, a.key))
	if cert.IsCA {
		a.cert, _ = x509.ParseCertificate(signed)
	}
	raw, _ := x509.MarshalPKCS8PrivateKey(key)
	file := func(name, kind string, text []byte) string {
		return replaceFile(t, dir, name, string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: text})))
	}
	return file(name+".pem", "CERTIFICATE", signed), file(name+".key", "PRIVATE KEY", raw)
}

// clientConfig trusts the authority, and has client.pem if that exists in a folder.
func (a *authority) clientConfig(dir string) *tls.Config {
	if a == nil {
		return nil
	}
	config := &tls.Config{RootCAs: x509.NewCertPool(), MaxVersion: tls.VersionTLS12} // --healthcheck speaks TLS 1.3
	config.RootCAs.AddCert(a.cert)
	if cert, err := tls.LoadX509KeyPair(dir+"/client.pem", dir+"/client.key"); err == nil {
		config.Certificates = []tls.Certificate{cert}
	}
	return config
}

// ---- Bodies and pages

// The forms of pages: as it came, for scrapers that know quoted names, and strict.
var (
	textForm        = form{quoted: true}
	openMetricsForm = form{format: format{openMetrics: true}, quoted: true}
	protobufForm    = form{format: format{protobuf: true}, quoted: true}
	strictForm      = form{strict: true}
	allForms        = []form{strictForm, {}, {format: format{openMetrics: true}}, textForm, openMetricsForm}
)

// plain finds bodies that storedOf can read.
var plain = regexp.MustCompile(`^(?:# (?:HELP [a-z_]+ [\w .]*|TYPE [a-z_]+ [a-z]+)\n|` +
	`[a-z_]+(?:\{[a-z]\w*="[\w .+-]*"\})? -?\d+(?: \d{1,12})?\n)*(?:# EOF\n)?$`)

// wantPlain wants on both pages what is in bodies, as read without the parser under test, if all of them are plain.
func wantPlain(t *testing.T, bodies []*exposition, texts [][]byte, openMetrics ...bool) {
	t.Helper()
	var all []direct
	for i, text := range texts {
		if !plain.Match(text) || bytes.Contains(text, []byte("exporter_name")) {
			return
		}
		all = append(all, storedOf(string(text), openMetrics[i], strconv.Itoa(i)))
	}
	for _, f := range []form{{format{openMetrics: slices.Contains(openMetrics, true)}, false, true}, strictForm} {
		wantStored(t, all, pageText(pageOf(f, bodies...)), f)
	}
}

// told returns the label that tells the series of a source apart.
func told(source string) *addedLabels {
	added := &addedLabels{telling: true}
	added.add("exporter_name", source)
	return added
}

// read reads a body and adds labels.
func read(text string, openMetrics bool, added *addedLabels) (*exposition, error) {
	return labelBody(strings.NewReader(text), format{openMetrics: openMetrics}, added, &workspace{}, math.MaxInt32)
}

// mustRead reads a body that has no fault.
func mustRead(t testing.TB, text string, openMetrics bool, added *addedLabels) *exposition {
	t.Helper()
	e, err := read(text, openMetrics, added)
	if err != nil {
		t.Fatalf("%v in\n%.2000s", err, text)
	}
	return e
}

// pageOf merges bodies on a page.
func pageOf(f form, expositions ...*exposition) *page {
	var bodies [][]*exposition
	for _, e := range expositions {
		bodies = append(bodies, e.as(f))
	}
	m, _ := merge(context.Background(), bodies, make([]string, len(bodies)), f)
	pg, _ := m.write(context.Background(), &sync.Pool{New: func() any { return new(chunk) }})
	return pg
}

func pageText(pg *page) string { return string(bytes.Join(pg.chunks, nil)) }

// checkShape wants HELP, TYPE and samples of each family once, together, and in
// the order of the families' names; those that only the program itself has come last.
func checkShape(t testing.TB, page string) {
	t.Helper()
	family, helped, kind := "", "", ""
	ownBegan := false
	suffixes := map[string][]string{"histogram": {"_sum", "_count", "_bucket"}, "summary": {"_sum", "_count"}}
	for line := range strings.Lines(page) {
		word := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "# HELP "):
			helped = word[2]
		case strings.HasPrefix(line, "# TYPE "):
			prefix, _, _ := strings.Cut(word[2], "_")
			mayBeOwn := slices.Contains([]string{"go", "process", "reverse"}, prefix)
			if word[2] <= family && !ownBegan && mayBeOwn {
				family, ownBegan = "", true
			}
			if word[2] <= family || ownBegan && !mayBeOwn || helped > family && helped != word[2] {
				t.Errorf("family %s behind %s (HELP of %s)", word[2], family, helped)
			}
			family, kind = word[2], word[3]
		default:
			name := line[:strings.IndexAny(line, "{ ")]
			suffix, ok := strings.CutPrefix(name, family)
			if !ok || suffix != "" && !slices.Contains(suffixes[kind], suffix) {
				t.Errorf("sample %s in family %s, a %s", name, family, kind)
			}
		}
	}
	if !strings.HasSuffix(page, "\n") || strings.Contains(page, "\n\n") {
		t.Error("the page has an empty line, or no newline at its end")
	}
}

// direct is what Prometheus 3 stores of one body, or of a page.
type direct struct {
	samples  []sampleOf
	metadata map[string]bool // TYPE and UNIT lines, with the names of their families
}

type sampleOf struct {
	source, name, labels, stored, moment, exemplar string // labels are as written and as Prometheus 3 stores them
	typed                                          bool   // the TYPE line before it is its own
}

// storedOf reads a well-formed body line by line, without the parser under test.
func storedOf(body string, openMetrics bool, source string) direct {
	d := direct{metadata: map[string]bool{}}
	line := regexp.MustCompile(`^([^{ ]+)(?:\{(.*?[^\\]"|)\})? (\S+)(?: ([^# ]+))?(?: (# .*))?$`)
	label := regexp.MustCompile(`([a-zA-Z_0-9]+)="((?:[^"\\]|\\.)*)"`)
	suffixes := map[string][]string{
		"counter": {"", "_total", "_created"}, "gauge": {""}, "info": {"_info"}, "stateset": {""},
		"histogram": {"", "_bucket", "_sum", "_count", "_created"}, "summary": {"", "_sum", "_count", "_created"},
	}
	family, kind := "", ""
	var told []string // TYPE and UNIT of the family
	for text := range strings.Lines(body) {
		text = strings.TrimSuffix(text, "\n")
		words := strings.Fields(text)
		switch {
		case strings.HasPrefix(text, "# TYPE "):
			family, kind, told = words[2], words[3], []string{text}
			continue
		case strings.HasPrefix(text, "# UNIT "):
			told = append(told, text)
			continue
		case strings.HasPrefix(text, "#"), text == "":
			continue
		}
		m := line.FindStringSubmatch(text)
		s := sampleOf{source: source, name: m[1], exemplar: m[5]}
		suffix, isOwn := strings.CutPrefix(m[1], family)
		s.typed = isOwn && slices.Contains(suffixes[kind], suffix)
		for _, line := range told {
			d.metadata[line] = d.metadata[line] || s.typed
		}
		var labels, stored []string
		for _, l := range label.FindAllStringSubmatch(m[2], -1) {
			value := l[2]
			isBound := l[1] == "le" && kind == "histogram" || l[1] == "quantile" && kind == "summary"
			if bound, err := strconv.ParseFloat(value, 64); isBound && err == nil {
				value = strconv.FormatFloat(bound, 'g', -1, 64)
				if !strings.ContainsAny(value, ".eIN") {
					value += ".0"
				}
			}
			if l[1] == "exporter_name" && source == "" {
				s.source = value
				continue
			}
			labels = append(labels, l[0])
			stored = append(stored, l[1]+"="+value)
		}
		slices.Sort(labels)
		slices.Sort(stored)
		s.labels, s.stored = strings.Join(labels, ","), strings.Join(stored, ",")
		stamp, _ := strconv.ParseFloat("0"+m[4], 64)
		if openMetrics {
			stamp *= 1000
		}
		s.moment = fmt.Sprintf("%s %d", m[3], int64(stamp))
		d.samples = append(d.samples, s)
	}
	return d
}

// wantStored wants the samples of all bodies on a page, and no others.
func wantStored(t *testing.T, bodies []direct, page string, f form) {
	t.Helper()
	untyped := map[string]bool{} // samples without a TYPE of their own, whose bounds are compared as numbers
	counts := map[string]int{}
	number := regexp.MustCompile(`(le|quantile)="?([^,"]*)"?`)
	key := func(s sampleOf) string {
		id := s.source + " " + s.name
		switch {
		case f.strict:
			return fmt.Sprint(id, s.labels, s.moment)
		case untyped[id]:
			s.stored = number.ReplaceAllStringFunc(s.stored, func(bound string) string {
				name, value, _ := strings.Cut(bound, "=")
				n, _ := strconv.ParseFloat(value, 64)
				return fmt.Sprint(name, "=", n)
			})
		}
		return fmt.Sprint(id, s.stored, s.moment, s.exemplar)
	}
	for _, d := range bodies {
		for _, s := range d.samples {
			untyped[s.source+" "+s.name] = untyped[s.source+" "+s.name] || !s.typed
		}
	}
	for _, d := range bodies {
		for _, s := range d.samples {
			counts[key(s)]++
		}
	}
	for _, s := range storedOf(page, f.openMetrics, "").samples {
		counts[key(s)]--
	}
	for sample, n := range counts {
		if n != 0 {
			t.Errorf("%+v: %+d of %s", f, -n, sample)
		}
	}
}

// seeds calls add for all bodies of testdata.
func seeds(f *testing.F, add func(text []byte, openMetrics bool)) {
	for _, folder := range []string{"scrapes", "cases/*", "appliance"} {
		for _, text := range readFiles(f, glob(f, "testdata/"+folder+"/*.prom")...) {
			add(text[:min(len(text), 4000)], endsOpenMetrics(text))
		}
	}
	for line := range strings.Lines(string(readFiles(f, "testdata/format.txt")[0])) {
		if body, openMetrics, ok := formatCase(f, line); ok {
			add([]byte(body), openMetrics)
		}
	}
}

// wantPage merges bodies, and wants a page that is taken again, is the page of itself (as it came, metadata without
// samples may stand elsewhere), and has so many samples but for those that it counts as duplicates.
func wantPage(t *testing.T, samples int, f form, bodies ...*exposition) (page string) {
	t.Helper()
	pg := pageOf(f, bodies...)
	page = pageText(pg)
	again := mustRead(t, page, f.openMetrics, &addedLabels{})
	if left := leftOut(pg.findings); again.samples+left != samples {
		t.Fatalf("%d samples and %d duplicates on the page, want %d\n%s", again.samples, left, samples, page)
	}
	if pg.size != len(page) {
		t.Fatalf("a page of %d bytes says that it has %d", len(page), pg.size)
	}
	second := pageOf(f, again)
	if f.strict && pageText(second) != page || len(second.conflicting) > 0 {
		t.Fatalf("the page is\n%s\nand of itself\n%s\nwith conflicts %v", page, pageText(second), second.conflicting)
	}
	wantSamples(t, pageText(second), f.openMetrics, page, f.openMetrics)
	if again.quoted && !f.quoted {
		t.Fatalf("quoted names on\n%s", page)
	}
	return page
}

// samplesOf returns the samples of a body as they are meant, in order, without exemplars.
func samplesOf(t *testing.T, text string, openMetrics bool) []string {
	t.Helper()
	p := parser{window: window{src: strings.NewReader(text), format: format{openMetrics: openMetrics}}}
	var samples []string
	for p.next() {
		if p.kind != sampleLine {
			continue
		}
		line := []byte(unescape.Replace(string(p.name)))
		for _, l := range p.byName() {
			name, value := string(p.labelName(l)), unescape.Replace(string(p.labelText(l)))
			if bound, err := strconv.ParseFloat(value, 64); err == nil && (name == "le" || name == "quantile") {
				value = fmt.Sprint(bound + 0) // as Prometheus stores it for some types
			}
			line = fmt.Appendf(line, " %q=%q", unescape.Replace(name), value)
		}
		stamp := string(p.stamp)
		if openMetrics && stamp != "" {
			stamp = strconv.FormatInt(int64(max(0, min(floatOf(p.stamp)*1000, 1<<62))), 10)
		}
		samples = append(samples, fmt.Sprintf("%s %s %s", line, p.valueText(), strings.TrimLeft(stamp, "0")))
	}
	if p.err != nil {
		t.Fatalf("%v in\n%s", p.err, text)
	}
	slices.Sort(samples)
	return samples
}

// wantSamples wants the samples of a body in another.
func wantSamples(t *testing.T, got string, gotOpenMetrics bool, want string, openMetrics bool) {
	t.Helper()
	if g, w := samplesOf(t, got, gotOpenMetrics), samplesOf(t, want, openMetrics); !slices.Equal(g, w) {
		t.Fatalf("got\n%s\nwant\n%s", strings.Join(g, "\n"), strings.Join(w, "\n"))
	}
}

// largeStamp finds timestamps that are too large for a float to hold their milliseconds.
var largeStamp = regexp.MustCompile(`[1-9]\d{15}`)

// leftOut counts the samples that were left out of a page.
func leftOut(found *findings) (n int) {
	for _, samples := range found.repeated {
		n += samples
	}
	return n
}

// worstCase is a body that costs more than others: many parts with so many samples each, $i being the number of the
// part, and $c one of many letters that all are _ without quotes. What stands around the parts is one more sample.
type worstCase struct {
	name              string
	before, part, end string
	samples           int
}

var worstCases = []worstCase{
	{"one series, over and over", "", "m{a=\"b\"} 1\n", "", 1},
	{"a long label value", `m{a="`, strings.Repeat("x", 100), "\"} 1\n", 0},
	{"newlines in a label value", `m{a="`, "\n", "\"} 1\n", 0},
	{"labels of one sample", "m{", `l$i="",`, "} 1\n", 0},
	{"labels that become one", "m{", `"$c"="",`, "} 1\n", 0},
	{"families", "", "# HELP f$i Text.\n# TYPE f$i gauge\nf$i 1\n", "", 1},
	{"quoted families", "", "{\"f.$i\"} 1\n", "", 1},
	{"quoted families that become one", "", "{\"$c\",a=\"$i\"} 1\n", "", 1},
	{"series", "", "m{a=\"$i\"} 1\n", "", 1},
	{"two families in turn", "", "h 1\nh_count 1\n", "", 2},
	{"two types in turn", "", "# TYPE h gauge\nh 1\n# TYPE h histogram\nh_count 1\n", "", 2},
	{"types behind samples", "", "h$i_count 1\n# TYPE h$i histogram\n", "", 1},
	{"a histogram in conflict", "# TYPE h histogram\nh_bucket{le=\"\"} 1\n", "h_sum 1\nh_count 1\n", "", 2},
	{"histograms in conflict", "", "# TYPE h$i histogram\nh$i_count -1\n", "", 1},
}

// body makes the body with n parts, and says how many samples it has.
func (c worstCase) body(n int) (body string, samples int) {
	b := []byte(c.before)
	for i := range n {
		number, letter := strconv.Itoa(i), string(rune(0x4e00+i)) // of the ideographs
		b = append(b, strings.NewReplacer("$i", number, "$c", letter).Replace(c.part)...)
	}
	if samples = n * c.samples; c.before != "" {
		samples++
	}
	return string(b) + c.end, samples
}

// generate makes families of gauges, counters and histograms with about series samples each: 100 of 100 are 1 MB.
func generate(families, series int) []byte {
	kinds := strings.Fields("gauge gauge gauge gauge counter counter counter histogram histogram histogram")
	samples := map[string][]string{"gauge": {"{%s}"}, "counter": {"{%s}"}, "histogram": {"_sum{%s}", "_count{%s}"}}
	for _, le := range strings.Fields("0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 +Inf") {
		samples["histogram"] = append(samples["histogram"], `_bucket{%s,le="`+le+`"}`)
	}
	labels := []string{
		`method="GET",code="200",handler="/api/v1/endpoint/%d"`,
		`namespace="prod",pod="web-7d9c5b8f6-%05d",container="app"`,
		`shard="%[1]d",path="C:\\DIR\\FILE.%[1]d"`,
	}
	var b bytes.Buffer
	for f := range families {
		name, kind := fmt.Sprintf("http_requests_by_what_answers_%04d", f), kinds[f%10]
		fmt.Fprintf(&b, "# HELP %s Current value of %[1]s, sampled at scrape time.\n# TYPE %[1]s %s\n", name, kind)
		for i := range series / len(samples[kind]) {
			value := []float64{float64(i), 94.05090880450125 / float64(i+1), float64(i) * 5.05702974996e+11, 0}[i%4]
			for _, sample := range samples[kind] {
				fmt.Fprintf(&b, "%s"+sample+" %v\n", name, fmt.Sprintf(labels[i%3], i), value)
			}
		}
	}
	return b.Bytes()
}

// workload is what benchmarks read: the bodies that the sources of one scrape answer.
type workload struct {
	name   string
	bodies [][]byte
}

// workloads returns the real scrapes, once and five times, two bodies with the same large
// families, and those of two applications that answer OpenMetrics.
func workloads(b *testing.B) []workload {
	real := readFiles(b, glob(b, "testdata/scrapes/*.prom")...)
	large := generate(100, 100)
	return []workload{
		{"8 real", real},
		{"40 real", slices.Repeat(real, 5)},
		{"2 generated", [][]byte{large, large}},
		{"2 OpenMetrics", readFiles(b, glob(b, "testdata/openmetrics/*.prom")...)},
	}
}

// ---- parse.go: Lines

// TestParserWindow reads bodies in pieces that end anywhere, also inside of lines that are
// longer than the window: the page is that of the body in memory.
func TestParserWindow(t *testing.T) {
	fill := func(line string) string { return strings.Repeat(line, windowSize/len(line)) }
	long := `a{b="` + strings.Repeat("x", windowSize) + "\n" + strings.Repeat("y\n", windowSize) + `"} `
	for name, body := range map[string]string{
		"long value":      long + "1\n" + long + "2\nb 3\n",
		"long comment":    "# " + strings.Repeat("c", 3*windowSize) + "\na 1\n",
		"line at border":  strings.Repeat("a 1\n", windowSize/4-1) + "abc 2\nd 3\n",
		"name for name":   fill("a 1\n") + fill("b 1\n"), // b stands where a stood
		"name for quotes": fill("a 1\n") + "{\"b.c\"} 1\n",
		"large families":  string(generate(15, 100)),
		"scrapes":         string(bytes.Join(readFiles(t, glob(t, "testdata/scrapes/*.prom")...), nil)),
	} {
		l := newLabeller(&exposition{}, told("x"))
		l.p = parserOf([]byte(body), format{})
		if err := l.readLines(nil, math.MaxInt32); err != nil || l.e.samples == 0 {
			t.Fatalf("%s: %d samples (%v)", name, l.e.samples, err)
		}
		text := strings.TrimSuffix(body, "\n")
		for _, src := range []io.Reader{
			strings.NewReader(text), iotest.OneByteReader(strings.NewReader(text)),
			iotest.DataErrReader(iotest.HalfReader(strings.NewReader(text))),
		} {
			e, err := labelBody(src, format{}, told("x"), &workspace{}, math.MaxInt32)
			if err != nil || pageText(pageOf(textForm, e)) != pageText(pageOf(textForm, l.e)) {
				t.Errorf("%s: another page when read by %T (%v)", name, src, err)
			}
		}
	}
}

// emptyReads is a reader that so often has nothing yet.
type emptyReads int

func (r *emptyReads) Read([]byte) (int, error) {
	if *r == 0 {
		return 0, io.EOF
	}
	*r--
	return 0, nil
}

// TestReadFaults tells of faults that are many windows from the start, and of those of
// readers: an error, also inside of a label value that is longer than the window, or 100 reads
// in a row that bring nothing, but not fewer, however many there are in all.
func TestReadFaults(t *testing.T) {
	text := func(text string) io.Reader { return strings.NewReader(text) }
	empty := func(n emptyReads) io.Reader { return &n }
	broken := iotest.ErrReader(errors.New("broken"))
	far := strings.Repeat("a{b=\"c\nd\"} 1\n\n", windowSize)
	farFault := fmt.Sprintf("line %d, column 4: \"\\\"} x\": expected a number as the value", 3*windowSize+2)
	for i, c := range []struct {
		fault string
		body  []io.Reader
	}{
		{farFault, []io.Reader{text(far), text("a{b=\"\n\"} x\n")}},
		{"broken", []io.Reader{broken}},
		{"broken", []io.Reader{text("a 1\n"), broken}},
		{"broken", []io.Reader{text(`a{b="`), broken}},
		{"broken", []io.Reader{text(`a{b="` + strings.Repeat("x\n", windowSize)), broken}},
		{"broken", []io.Reader{text(far), broken}},
		{"<nil>", []io.Reader{text(`a{b="c`), empty(99), text("\n\"} 1\n"), empty(99), text("b 2")}},
		{io.ErrNoProgress.Error(), []io.Reader{text("a 1\n"), empty(100), text("b 2")}},
	} {
		_, err := labelBody(io.MultiReader(c.body...), format{}, &addedLabels{}, &workspace{}, math.MaxInt32)
		if fmt.Sprint(err) != c.fault {
			t.Errorf("body %d: %v, want %s", i, err, c.fault)
		}
	}
}

// ---- parse.go: Samples

// TestManyLabels finds a repeated label name among few and among many, and takes no more than maxLabels.
func TestManyLabels(t *testing.T) {
	for _, n := range []int{2, fewLabels - 1, fewLabels, fewLabels + 1, 500, maxLabels} {
		labels := []byte("m{")
		for i := range n {
			labels = fmt.Appendf(labels, `l%d="",`, i)
		}
		mustRead(t, string(labels)+"} 1", false, &addedLabels{})
		fault := "duplicate label name"
		if n == maxLabels {
			fault = fmt.Sprintf("more than %d labels", maxLabels)
			if _, err := read(string(labels)+"} 1", false, told("x")); err == nil {
				t.Error("with an added label, what is written could not be read again")
			}
		}
		if _, err := read(string(labels)+`l1=""} 1`, false, &addedLabels{}); !strings.Contains(fmt.Sprint(err), fault) {
			t.Errorf("%d labels and one of them again: %v", n, err)
		}
	}
}

// ---- parse.go: Labelling

// TestAllocations wants the same allocations for ten times the samples.
func TestAllocations(t *testing.T) {
	runtime.GC() // its first run allocates, too
	added := told("x")
	for _, c := range []struct {
		name, line  string
		openMetrics bool
	}{
		{"plain", "m{a=\"b\",c=\"%d\"} 1.5e-3\n", false},
		{"odd", "m{ a=\"b\\t\" c=\"%d\" , } +Inf 123\r\n", false},
		{"exported", "m{exporter_name=\"%d\"} 1\n", false},
		{"buckets", "h_bucket{a=\"b\",le=\"%d.5\"} 1\n", false},
		{"quoted", "{\"a.b\",\"c.d\"=\"%d\"} 1\n", false},
		{"OpenMetrics", "m_total{a=\"%d\"} 1 1700000000.123 # {trace_id=\"x\"} 0.5 1700000000.1\n", true},
		{"odd OpenMetrics",
			"m_total{exporter_name=\"%d\",} 1 1700000000.123 # {trace_id=\"x\"} 0.5 1700000000.1\n", true},
		{"histogram", "# TYPE h histogram\nh_bucket{a=\"%d\",le=\"+Inf\"} 1 1700000000123\n", false},
	} {
		count := func(n int, pages bool) float64 {
			var b []byte
			for i := range n {
				b = fmt.Appendf(b, c.line, i)
			}
			if c.openMetrics {
				b = append(b, "# EOF\n"...)
			}
			used := &workspace{likely: 3 * len(b)}
			return testing.AllocsPerRun(5, func() {
				e := must(labelBody(bytes.NewReader(b), format{openMetrics: c.openMetrics}, added, used, math.MaxInt32))
				if pages {
					pageOf(openMetricsForm, e)
					pageOf(textForm, e)
				}
			})
		}
		if few, many := count(1000, false), count(10000, false); many > few {
			t.Errorf("%s: %v allocations for 1,000 samples, %v for 10,000", c.name, few, many)
		}
		if few, many := count(1000, true), count(10000, true); many > few+30 { // buffers grow
			t.Errorf("%s: %v allocations for pages of 1,000 samples, %v for 10,000", c.name, few, many)
		}
	}
}

// BenchmarkScrape parses and labels bodies in the buffers that a source uses again, as they are and as protobuf.
func BenchmarkScrape(b *testing.B) {
	all := workloads(b)
	for _, w := range all {
		for i, body := range w.bodies {
			w.bodies = slices.Clone(w.bodies)
			e := mustRead(b, string(body), endsOpenMetrics(body), &addedLabels{})
			w.bodies[i] = []byte(pageText(pageOf(protobufForm, e)))
		}
		all = append(all, workload{w.name + "_protobuf", w.bodies})
	}
	for _, w := range all {
		b.Run(w.name, func(b *testing.B) {
			b.SetBytes(int64(len(bytes.Join(w.bodies, nil))))
			b.ReportAllocs()
			used := &workspace{}
			for b.Loop() {
				for _, body := range w.bodies {
					f := format{endsOpenMetrics(body), strings.HasSuffix(w.name, "_protobuf")}
					e := must(labelBody(bytes.NewReader(body), f, told("x"), used, 1<<30))
					used.likely = len(e.buf) + 2<<10
				}
			}
		})
	}
}

// ---- parse.go: One exposition

// TestFormat reads every edge of the format: testdata/format.txt has, after each body, the
// page or the fault that comes of it, and for OpenMetrics the page in that format, which may
// be the same as the body. A page beside a real scrape has what both have alone. A comment
// after a body changes nothing, though short bodies are scanned in another way.
func TestFormat(t *testing.T) {
	files := readFiles(t, "testdata/format.txt", "testdata/scrapes/node_exporter.prom")
	node := mustRead(t, string(files[1]), false, told("node"))
	nodePage := pageText(pageOf(textForm, node))
	sorted := func(page string) []string { return slices.Sorted(strings.Lines(page)) }
	var got strings.Builder
	for line := range strings.Lines(string(files[0])) {
		kind, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if kind == "page" || kind == "strict" || kind == "fault" || kind == "same" {
			continue
		}
		got.WriteString(line)
		if kind == "protobuf" {
			message, _ := encode('F', strings.Fields(line)[1:])
			if e, err := readProtobuf(append(binary.AppendUvarint(nil, uint64(len(message))), message...)); err != nil {
				fmt.Fprintf(&got, "fault %q\n", err.Error())
			} else {
				page, bare := pageText(pageOf(protobufForm, e)), form{format: format{protobuf: true}}
				fmt.Fprintf(&got, "page with %d samples: %s", e.samples, inWords(page))
				if strict := pageText(pageOf(bare, e)); strict != page {
					fmt.Fprintf(&got, "strict %s", inWords(strict))
				}
			}
		}
		body, openMetrics, ok := formatCase(t, line)
		if !ok {
			continue
		}
		e, err := read(body, openMetrics, &addedLabels{telling: true})
		longer, longerErr := read(body+"\n# eight bytes and more\n", false, &addedLabels{telling: true})
		if !openMetrics && (fmt.Sprint(longerErr) != fmt.Sprint(err) ||
			err == nil && pageText(pageOf(textForm, longer)) != pageText(pageOf(textForm, e))) {
			t.Errorf("%q: another page or fault before a comment (%v)", body, longerErr)
		}
		if err != nil {
			fmt.Fprintf(&got, "fault %q\n", err.Error())
			continue
		}
		page := pageText(pageOf(textForm, e))
		fmt.Fprintf(&got, "page %q\n", page)
		if strict := pageText(pageOf(strictForm, e)); strict != page {
			fmt.Fprintf(&got, "strict %q\n", strict)
		}
		if again := pageText(pageOf(openMetricsForm, e)); openMetrics && again == body {
			got.WriteString("same\n")
		} else if openMetrics {
			fmt.Fprintf(&got, "page %q\n", again)
		}
		if both := pageText(pageOf(textForm, node, e)); !slices.Equal(sorted(both), sorted(nodePage+page)) {
			t.Errorf("%q: the page of both is not what each has alone", body)
		}
		checkShape(t, pageText(pageOf(strictForm, e, node)))
	}
	wantFile(t, "testdata/format.txt", got.String())
}

// formatCase returns the body in a line of testdata/format.txt that has one.
func formatCase(t testing.TB, line string) (body string, openMetrics, ok bool) {
	t.Helper()
	kind, quoted, _ := strings.Cut(strings.TrimSpace(line), " ")
	if kind != "text" && kind != "openmetrics" {
		return "", false, false
	}
	body, err := strconv.Unquote(quoted)
	if err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	return body, kind == "openmetrics", true
}

// fieldNames are the names of the fields in messages of protobuf, by number.
var fieldNames = map[byte]string{'F': "name help type metric unit", 'L': "name value", 'G': "value",
	'E': "label value timestamp", 'M': "label gauge counter summary untyped timestamp_ms histogram",
	'C': "value exemplar created", 'T': "seconds nanos", 'S': "count sum quantile created", 'Q': "quantile value",
	'B': "count bound exemplar float_count", 'P': "offset length",
	'H': "count sum bucket float_count schema threshold zeros float_zeros negative_span negative_delta " +
		"negative_count span delta bucket_count created exemplar"}

// encode reads a message that ends with a brace: names of fields, each with its value.
func encode(message byte, words []string) (out []byte, rest []string) {
	for len(words) > 1 && words[0] != "}" {
		number := 1 + slices.Index(strings.Fields(fieldNames[message]), words[0])
		kind, contents := strings.Replace(fieldTypes[message], "m", "M", 1)[number], []byte(words[1])
		if words = words[2:]; string(contents) == "{" {
			contents, words = encode(kind, words)
		}
		if value, err := strconv.ParseFloat(string(contents), 64); err != nil || kind == 's' {
			out = appendBytes(out, number, contents)
		} else if kind == 'f' || kind == 'd' {
			out = appendFloat(out, number, value)
		} else {
			out = appendInteger(out, number, uint64(value))
		}
	}
	return out, words[min(1, len(words)):]
}

// oddText finds text that is not one word.
var oddText = regexp.MustCompile(`^$|[^\pL\w.:+/-]`)

// decode writes the fields of a message as encode reads them, but odd text in quotes, and packed numbers in brackets.
func decode(p *parser, message byte, i, end int) (out []byte) {
	for i < end {
		before, after := "", ""
		if p.buf[i]&7 == bytesWire {
			before, after = "[ ", "] "
		}
		kind, number, from, to := p.field(message, i, end)
		if i = to; kind == ' ' {
			return append(out, "? "...) // no such field
		}
		out = fmt.Appendf(out, "%s ", strings.Fields(fieldNames[message])[number-1])
		if text := p.buf[from:to]; kind == 's' && oddText.Match(text) {
			out = fmt.Appendf(out, "%q ", text)
		} else if kind == 's' {
			out = fmt.Appendf(out, "%s ", text)
		} else if kind == 'm' || kind < 'Z' {
			out = fmt.Appendf(out, "{ %s} ", decode(p, []byte{kind, 'M'}[kind/'m'], from, to))
		} else {
			for out = append(out, before...); from < to; {
				if kind == 'v' || kind == 'i' {
					var value uint64
					value, from = p.varint(from, to)
					out = fmt.Appendf(out, "%d ", int64(value))
				} else {
					out = fmt.Appendf(out, "%v ", p.float(span{uint32(from), uint32(to)}))
					from += 8
				}
			}
			out = append(out, after...)
		}
	}
	return out
}

// inWords returns a page of protobuf as decode writes it, each message on a line.
func inWords(page string) (lines string) {
	p := parserOf([]byte(page), format{protobuf: true})
	for i := 0; i < len(page); {
		size, from := p.varint(i, len(page))
		i = from + int(size)
		lines += strings.TrimSpace(string(decode(&p, 'F', from, i))) + "\n"
	}
	return lines
}

// readProtobuf reads a body of protobuf.
func readProtobuf(body []byte) (*exposition, error) {
	return labelBody(bytes.NewReader(body), format{protobuf: true}, told("x"), &workspace{}, 1<<20)
}

// FuzzParse reads a body: what is taken is on its page, sample by sample, in both formats.
func FuzzParse(f *testing.F) {
	seeds(f, func(text []byte, openMetrics bool) {
		f.Add(text, openMetrics)
		if e, err := read(string(text), openMetrics, &addedLabels{}); err == nil {
			f.Add([]byte(pageText(pageOf(protobufForm, e))), false)
		}
	})
	f.Fuzz(func(t *testing.T, text []byte, openMetrics bool) {
		e, err := read(string(text), openMetrics, told("0"))
		if e, err := readProtobuf(text); err == nil { // it may be that as well
			page := pageText(pageOf(protobufForm, e))
			if again, err := readProtobuf([]byte(page)); err != nil || again.samples != e.samples {
				t.Fatalf("%v on the page of protobuf", err)
			}
		}
		if err != nil {
			if e != nil {
				t.Fatal("a refused body is handed on")
			}
			return
		}
		bare := mustRead(t, string(text), openMetrics, &addedLabels{})
		wantPlain(t, []*exposition{e}, [][]byte{text}, openMetrics)
		for _, f := range allForms {
			wantPage(t, e.samples, f, e)
			page := wantPage(t, e.samples, f, bare)
			if !f.quoted || largeStamp.Match(text) {
				continue
			}
			wantSamples(t, page, f.openMetrics, string(text), openMetrics)
			again, _ := read(page, f.openMetrics, &addedLabels{})
			other := form{format{openMetrics: !f.openMetrics}, false, true}
			wantSamples(t, pageText(pageOf(other, again)), other.openMetrics, string(text), openMetrics)
		}
	})
}

// ---- exec.go: The waterfall

// stand is a waterfall with runs that a test begins and ends.
type stand struct {
	waterfall
	mu      sync.Mutex
	begun   []string            // keys in the order of their runs
	told    []string            // how long each of them was told to have
	release map[string]chan int // ends the run of a key, which delivers so many bytes
	active  int
	most    int // runs at one time
	counted []string
}

// newStand returns a waterfall whose runs last until they are released, also if
// they are cancelled, unless obedient is set.
func newStand(t *testing.T, serial, obedient bool) *stand {
	s := &stand{release: map[string]chan int{}}
	life, end := context.WithCancel(context.Background())
	t.Cleanup(end)
	config := &sourceConfig{kind: "exec", timeout: time.Hour}
	s.waterfall = waterfall{sourceConfig: config, places: 16, life: life, keys: map[string]*key{}}
	s.status.failures = map[string]uint64{}
	if !serial {
		s.kind, s.places = "http", 128
	}
	s.budget = &budget{most: 1 << 30}
	s.budget.last.Store(1)
	s.report = func(r *result, changes int) {
		reason := "ok"
		if r.failure != nil {
			reason = r.failure.reason
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.counted = append(s.counted, reason)
	}
	s.do = func(ctx context.Context, r *result, values []string) (f *failure) {
		s.mu.Lock()
		s.begun = append(s.begun, cmp.Or(values[0], "-"))
		s.told = append(s.told, r.told.String())
		released := make(chan int, 1)
		s.release[values[0]] = released
		s.active++
		s.most = max(s.most, s.active)
		s.mu.Unlock()
		done := ctx.Done()
		if !obedient {
			done = nil
		}
		select {
		case n := <-released:
			r.held, r.bodies = int64(n), []*exposition{{buf: make([]byte, n)}}
			if n == panics {
				panic("as told")
			}
			if n == fails {
				f = fail("exit", "as told")
			}
		case <-done:
			f = fail("timeout", "cancelled")
		}
		s.mu.Lock()
		s.active--
		s.mu.Unlock()
		return f
	}
	return s
}

const (
	fails  = 1000001
	panics = 1000002
)

// end releases the run of a key.
func (s *stand) end(id string, n int) {
	synctest.Wait()
	s.mu.Lock()
	released := s.release[id]
	s.mu.Unlock()
	released <- n
	synctest.Wait()
}

// keysRun returns the keys of the runs so far.
func (s *stand) keysRun() string {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.begun, " ")
}

// empty fails unless the waterfall has dropped all it held.
func (s *stand) empty(t *testing.T) {
	t.Helper()
	synctest.Wait()
	s.waterfall.mu.Lock()
	defer s.waterfall.mu.Unlock()
	if len(s.keys) > 0 || s.running > 0 || len(s.waiting) > 0 {
		t.Errorf("%d keys are left", len(s.keys))
	}
	if n := s.budget.spent.Load(); n != 0 {
		t.Errorf("%d bytes are spent though nothing is kept", n)
	}
}

// TestWaterfall plays the scenes of testdata/waterfall.txt, which begins with a list of the steps.
func TestWaterfall(t *testing.T) {
	text := string(readFiles(t, "testdata/waterfall.txt")[0])
	for _, part := range strings.Split(strings.TrimSpace(text), "\n\n")[1:] {
		title, steps, _ := strings.Cut(part, "\n")
		t.Run(strings.TrimPrefix(title, "# "), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &scene{tickets: map[string]*ticket{}}
				for step := range strings.Lines(steps) {
					if got, want := s.do(t, strings.Fields(step)); got != want {
						t.Fatalf("%s: got %q, want %q", strings.TrimSpace(step), got, want)
					}
				}
				for _, tk := range s.tickets {
					tk.leave(false)
				}
				time.Sleep(2 * time.Hour)
				s.empty(t)
			})
		})
	}
}

// scene is a waterfall with the scrapes of a scene.
type scene struct {
	*stand
	tickets map[string]*ticket
	stop    context.CancelFunc
}

// do does a step and returns what it shows and is to show.
func (s *scene) do(t *testing.T, step []string) (got, want string) {
	verb, args := step[0], strings.Join(step[1:], " ")
	step = append(step, "", "", "")
	name, value, within := step[1], step[2], cmp.Or(step[3], "1h")
	tk := s.tickets[name]
	synctest.Wait()
	if verb == "source" {
		s.set(t, step[1:])
		return "", ""
	}
	before := s.snapshot().failures["busy"]
	switch verb {
	case "join":
		chosen, _ := sceneVisit(value)
		d, _ := time.ParseDuration(within)
		tk = s.join(chosen, time.Now().Add(d))
		s.tickets[name] = tk
	case "full":
		tk = s.join(sceneVisit(name))
		tk.leave(false)
		return fmt.Sprint(tk.result() == refused, s.snapshot().failures["busy"]-before), "true 1"
	case "leave", "expire", "busy":
		delete(s.tickets, name)
		tk.leave(verb != "leave")
		return fmt.Sprint(s.snapshot().failures["busy"] - before), fmt.Sprint(oneIf(verb == "busy"))
	case "end":
		n, _ := strconv.Atoi(value)
		s.end(strings.Trim(name, "-"), cmp.Or(map[string]int{"fails": fails, "panics": panics}[value], n))
	case "sleep":
		d, _ := time.ParseDuration(name)
		time.Sleep(d)
	case "got":
		return s.got(tk), value
	case "runs":
		return s.keysRun(), args
	case "told":
		return strings.Join(s.told, " "), args
	case "counted":
		return strings.Join(s.counted, " "), args
	case "keys":
		return strconv.Itoa(len(s.keys)), name
	case "stop":
		s.stop()
	case "drain":
		s.drain()
	default:
		t.Fatalf("there is no step %q", verb)
	}
	return "", ""
}

// set makes the source of a scene.
func (s *scene) set(t *testing.T, settings []string) {
	s.stand = newStand(t, settings[0] == "exec", !slices.Contains(settings, "stubborn"))
	s.life, s.stop = context.WithCancel(s.life)
	for _, setting := range settings[1:] {
		name, value, _ := strings.Cut(setting, "=")
		n, _ := strconv.Atoi(value)
		d, _ := time.ParseDuration(value)
		switch name {
		case "places":
			s.places = n
		case "parallel":
			s.parallel = n
		case "budget":
			s.budget.most = int64(n)
		case "max-age":
			s.maxAge = d
		case "timeout":
			s.timeout = d
		}
	}
}

// got tells what a scrape gets whose time is over.
func (s *scene) got(tk *ticket) string {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	tk.wait(ctx)
	switch r := tk.result(); {
	case r == late:
		return "late"
	case r == queued:
		return "queued"
	case r.failure != nil && r.failure.reason == "internal" && len(r.bodies) > 0:
		return "what a panic left"
	case r.failure != nil:
		return r.failure.reason
	default:
		return strconv.Itoa(len(r.bodies[0].buf))
	}
}

// sceneVisit returns what a scrape joins with; the key - has the default arguments.
func sceneVisit(key string) (arguments, time.Time) {
	id := strings.Trim(key, "-")
	return arguments{id, []string{id}, id == ""}, time.Now().Add(time.Hour)
}

// TestBudget bounds the memory of results with arguments that scrapers chose: what is over is
// busy, and the default arguments are served beside it.
func TestBudget(t *testing.T) {
	var waiting sync.WaitGroup
	waiting.Add(31)
	body := strings.Repeat("metric{a=\"b\"} 1\n", 1<<14) // about 600 KB with its label
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		waiting.Done()
		waiting.Wait() // until all are in flight
		io.WriteString(w, body)
	}))
	defer exporter.Close()
	p, _ := newTestProgram(t, "--http", "x="+exporter.URL, "--params", "x:*", "--max-bytes", "1MiB", "--max-age", "1h")
	s := p.sources[0]
	var scrapes sync.WaitGroup
	var served, busy atomic.Int32
	scrape := func(query url.Values) *result {
		chosen, _ := s.arguments(query, prometheus3)
		tk := s.join(chosen, time.Now().Add(time.Hour))
		defer tk.leave(false)
		tk.wait(t.Context())
		return tk.result()
	}
	for i := range 30 {
		scrapes.Go(func() {
			if r := scrape(url.Values{"a": {strconv.Itoa(i)}}); r.failure == nil {
				served.Add(1)
			} else if r.failure.reason == "busy" {
				busy.Add(1)
			}
		})
	}
	if r := scrape(nil); r.failure != nil {
		t.Errorf("with default arguments: %v", r.failure)
	}
	scrapes.Wait()
	if served.Load() < 2 || served.Load()+busy.Load() != 30 || busy.Load() < 20 { // 4 MiB have room for 6 or 7
		t.Errorf("%d served, %d busy", served.Load(), busy.Load())
	}
	if spent := s.budget.spent.Load(); spent > 4<<20 || spent < 1<<20 {
		t.Errorf("what is kept takes %d bytes", spent)
	}
	waiting.Add(1)
	s.budget.last.Store(5 << 20)
	if r := scrape(url.Values{"b": {""}}); r.failure != nil {
		t.Errorf("after a result with default arguments that took more than there is for others: %v", r.failure)
	}
}

// TestPlaces gives an exporter more places for chosen arguments than what runs one at a time.
func TestPlaces(t *testing.T) {
	p, _ := newTestProgram(t, "--exec", "command=x {a=b}", "--parallel", "command:3", "--file", "files=x",
		"--http", "exporter=http://x")
	if s := p.sources[0]; s.parallel != 3 {
		t.Errorf("%d runs at once", s.parallel)
	}
	for i, want := range []int{16, 16, 128} {
		if s := p.sources[i]; s.places != want || s.budget.most != 4*s.maxBytes {
			t.Errorf("%s has %d places and %d bytes for them", s.name, s.places, s.budget.most)
		}
	}
}

// TestWaterfallModel makes thousands of random steps, and compares the waterfall
// with a model of its rules after each.
func TestWaterfallModel(t *testing.T) {
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) { modelSteps(t, rand.New(rand.NewPCG(seed, 0)), seed%2 == 0) })
	}
}

// modelFetch is what the rules say of one fetch.
type modelFetch struct {
	id        string
	tickets   []*ticket
	cancelled bool
}

func modelSteps(t *testing.T, rnd *rand.Rand, serial bool) {
	s := newStand(t, serial, false)
	s.places = 5
	ids := []string{"", "a", "b", "c", "d", "e", "f", "g"}
	lanes := map[string][]*modelFetch{} // the first of each lane is running
	laneOf := func(id string) string {
		if serial {
			return "all"
		}
		return id
	}
	owner := map[*ticket]*modelFetch{}
	held := map[string]int{} // tickets of a key, of fetches that ended as well
	for range 300 {
		id := ids[rnd.IntN(len(ids))]
		lane := laneOf(id)
		switch rnd.IntN(3) {
		case 0: // a scrape comes
			isThere := func(id string) bool {
				isIt := func(f *modelFetch) bool { return f.id == id }
				return held[id] > 0 || slices.ContainsFunc(lanes[laneOf(id)], isIt)
			}
			known, n := isThere(id), 0
			for _, other := range ids[1:] {
				n += int(oneIf(isThere(other)))
			}
			places := s.places
			if running := lanes["all"]; len(running) > 0 && running[0].id != "" {
				places++
			}
			tk := s.join(sceneVisit(id))
			if full := id != "" && !known && n >= places; full != (tk.key == nil) {
				t.Fatalf("key %q with %d others, %d places: refused %v", id, n, places, tk.key == nil)
			}
			if tk.key == nil {
				continue
			}
			i := slices.IndexFunc(lanes[lane], func(f *modelFetch) bool { return f.id == id && !f.cancelled })
			if i < 0 {
				i = len(lanes[lane])
				if id == "" { // before all others that wait
					i = min(i, 1)
				}
				lanes[lane] = slices.Insert(lanes[lane], i, &modelFetch{id: id})
			}
			lanes[lane][i].tickets = append(lanes[lane][i].tickets, tk)
			owner[tk] = lanes[lane][i]
			held[id]++
		case 1: // a scrape leaves
			for tk, f := range owner {
				if f.id != id {
					continue
				}
				tk.leave(false)
				delete(owner, tk)
				held[id]--
				f.tickets = slices.DeleteFunc(f.tickets, func(other *ticket) bool { return other == tk })
				if i := slices.Index(lanes[lane], f); len(f.tickets) == 0 && i == 0 {
					f.cancelled = true
				} else if len(f.tickets) == 0 && i > 0 {
					lanes[lane] = slices.Delete(lanes[lane], i, i+1)
				}
				break
			}
		case 2: // the run of a lane ends
			if len(lanes[lane]) == 0 {
				continue
			}
			f := lanes[lane][0]
			s.end(f.id, 1)
			lanes[lane] = lanes[lane][1:]
			for _, tk := range f.tickets {
				if r := tk.result(); r == nil || r == late || r == queued {
					t.Fatalf("key %q: its fetch ended, but there is no result", f.id)
				}
			}
		}
		synctest.Wait()
		compareLanes(t, s, lanes, held)
	}
	if serial && s.most > 1 {
		t.Errorf("%d runs at once", s.most)
	}
	for tk := range owner {
		tk.leave(false)
	}
	for _, fetches := range lanes { // the cancelled ones end at last
		if len(fetches) > 0 {
			s.end(fetches[0].id, 1)
		}
	}
	s.empty(t)
}

// compareLanes compares what runs and waits, and what is held, with the model.
func compareLanes(t *testing.T, s *stand, lanes map[string][]*modelFetch, held map[string]int) {
	t.Helper()
	s.waterfall.mu.Lock()
	defer s.waterfall.mu.Unlock()
	for name, want := range lanes {
		all := slices.Clone(s.waiting)
		for _, k := range s.keys {
			if k.running != nil {
				all = slices.Insert(all, 0, k.running)
			}
		}
		got := slices.DeleteFunc(all, func(f *fetch) bool { return s.kind == "http" && f.key.id != name })
		if len(got) != len(want) {
			t.Fatalf("lane %s: %d fetches, want %d", name, len(got), len(want))
		}
		for i, f := range got {
			others := func(tk *ticket) bool { return tk.fetch != f }
			waiters := len(slices.DeleteFunc(slices.Collect(maps.Keys(f.key.tickets)), others))
			if f.key.id != want[i].id || f.cancelled != want[i].cancelled || waiters != len(want[i].tickets) {
				t.Fatalf("lane %s, %d: key %q, cancelled %v, %d tickets, want %q, %v, %d",
					name, i, f.key.id, f.cancelled, waiters, want[i].id, want[i].cancelled, len(want[i].tickets))
			}
		}
	}
	for id, k := range s.keys {
		if n := len(k.tickets); n != held[id] || n == 0 && k.newest != nil {
			t.Fatalf("key %q: %d tickets, want %d, result held: %v", id, n, held[id], k.newest != nil)
		}
	}
}

// background runs a source at an interval of 10 s, with what it does at each run, and
// returns when its runs began and how a scrape now gets its last result.
func background(t *testing.T, do func(n int, r *result) *failure, flags ...string) (*[]time.Duration, func() *result) {
	p, _ := newTestProgram(t, append([]string{"--exec", "x=true", "--interval", "x:10s"}, flags...)...)
	s := p.sources[0]
	start := time.Now()
	began := &[]time.Duration{}
	s.do = func(_ context.Context, r *result, _ []string) *failure {
		n := len(*began)
		r.bytes = int64(n)
		*began = append(*began, time.Since(start))
		return do(n, r)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go s.repeat(ctx)
	synctest.Wait()
	return began, func() *result {
		tk := s.join(sceneVisit("-"))
		defer tk.leave(false)
		tk.wait(context.Background())
		return tk.result()
	}
}

// TestInterval fetches in the background without drift or overlap, serves the last result
// meanwhile, also a failure, and tries again sooner after one.
func TestInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		takes := []time.Duration{time.Second, 12 * time.Second, 0, 0, 0, 0, 0}
		start := time.Now()
		began, last := background(t, func(n int, _ *result) *failure {
			time.Sleep(takes[min(n, 6)])
			if n >= 2 && n <= 4 || n == 6 {
				return fail("exit", "as told")
			}
			return nil
		}, "--timeout", "20s")
		if r := last(); r.bytes != 0 || time.Since(start) != time.Second {
			t.Errorf("the first scrape got run %d at %v, want the first when it ended", r.bytes, time.Since(start))
		}
		time.Sleep(14 * time.Second) // at 15 s the second run is under way, until 22 s
		if r := last(); r.bytes != 0 || time.Since(start) != 15*time.Second {
			t.Errorf("a scrape got run %d at %v, want the last at once", r.bytes, time.Since(start))
		}
		time.Sleep(20 * time.Second) // at 35 s the third and fourth have failed
		synctest.Wait()
		if r := last(); r.failure == nil {
			t.Error("a failed run shows old data")
		}
		time.Sleep(36 * time.Second)
		synctest.Wait()
		if got, want := fmt.Sprint(*began), "[0s 10s 30s 35s 45s 55s 1m0s 1m5s 1m10s]"; got != want {
			t.Errorf("runs began at %v, want %v", got, want)
		}
	})
}

// TestStandIn serves the last good result of a source in the background while it fails, no
// longer than --max-age, and says all the while that it is down.
func TestStandIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, last := background(t, func(n int, r *result) *failure {
			switch {
			case n == 0:
				r.bodies = []*exposition{{samples: 7}}
				return nil
			case n == 8: // at 75 s: a glob with one broken file
				r.bodies = []*exposition{{samples: 3}}
			}
			r.exit, r.files = new(int), []fileTime{{"x", time.Now()}}
			return fail("exit", "as told")
		}, "--max-age", "1m")
		for _, c := range []struct {
			at      time.Duration
			samples int
			up      bool
		}{
			{5 * time.Second, 7, true}, {11 * time.Second, 7, false}, {59 * time.Second, 7, false},
			{61 * time.Second, 0, false}, {76 * time.Second, 3, false},
		} {
			time.Sleep(c.at - time.Duration(time.Now().UnixNano()%int64(time.Hour)))
			synctest.Wait()
			if r := last(); r.samples() != c.samples || (r.failure == nil) != c.up {
				t.Errorf("at %v: %d samples, %v; want %d, up %v", c.at, r.samples(), r.failure, c.samples, c.up)
			} else if !c.up && (r.exit == nil || len(r.files) != 1) {
				t.Errorf("at %v: what else the failed run told is gone", c.at)
			}
		}
	})
}

// TestTooLate gives a scrape nothing that ended before it came, though it was not known yet.
func TestTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t, true, false)
		first := s.join(sceneVisit("a"))
		time.Sleep(time.Second)
		end := time.Now()
		time.Sleep(time.Nanosecond)
		second := s.join(sceneVisit("a"))
		s.finish(first.fetch, &result{start: first.came, end: end, told: time.Hour})
		if first.result().end != end || second.result() != queued {
			t.Errorf("the first got %v, the second %v", first.result(), second.result())
		}
		s.end("a", 1)
		s.end("a", 2)
		if second.result().end.Before(second.came) || s.keysRun() != "a a" {
			t.Errorf("the second got %v", second.result())
		}
		old, third := weak.Make(second.result()), s.join(sceneVisit("a"))
		s.end("a", 3)
		if runtime.GC(); old.Value() != nil { // or a thousand who wait would hold a thousand results
			t.Error("who has got a newer result holds the old one")
		}
		first.leave(false)
		second.leave(false)
		third.leave(false)
		s.empty(t)
	})
}

// TestOldTimer lets a timer that comes late do no harm to the newer result of its key, nor to
// the key that has taken the place of its own.
func TestOldTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t, true, false)
		s.maxAge, s.places = time.Minute, 1
		keep := func(id string) *key {
			tk := s.join(sceneVisit(id))
			s.end(id, 1)
			tk.leave(false)
			return tk.key
		}
		old := keep("a")
		time.Sleep(time.Second)
		s.tidy(old)
		if s.keys["a"] != old || old.newest == nil {
			t.Error("a result that is young is dropped")
		}
		if keep("b"); old.newest != nil || old.expiry.Stop() {
			t.Error("something of a key is held that has made room")
		}
		now := keep("a")
		s.tidy(old)
		if s.keys["a"] != now || now == old || now.newest == nil {
			t.Error("a key is dropped in the place of the one before")
		}
		s.interval = time.Hour
		s.waterfall.keep(now, &result{failure: fail("exit", "as told")})
		s.tidy(now)
		if len(now.newest.bodies) == 0 {
			t.Error("bodies that stand in are dropped while they are young")
		}
		s.waterfall.keep(now, &result{failure: fail("exit", "as told"), bodies: make([]*exposition, 2)})
		if len(now.newest.bodies) != 2 {
			t.Error("others stand in for the bodies of a run that failed in part")
		}
		s.interval = 0
		s.tidy(now)
		time.Sleep(time.Hour)
		s.empty(t)
	})
}

// TestDrain waits for a run that ends, and a while for one that hangs.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := newTestProgram(t, backup)
		for _, takes := range []time.Duration{500 * time.Millisecond, time.Minute} {
			p.sources[0].runs.Go(func() { time.Sleep(takes) })
			begin := time.Now()
			within(time.Second, p.sources[0].drain)
			if d := time.Since(begin); d != min(takes, time.Second) {
				t.Errorf("waited %v for a run of %v", d, takes)
			}
		}
		time.Sleep(time.Minute)
	})
}

// waiters returns how many scrapes wait for the source.
func (w *waterfall) waiters() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range w.keys {
		n += len(k.tickets)
	}
	return n
}

// TestFloodOverHTTP lets 1,000 scrapers over real connections, with gzip, at two endpoints, share one run.
func TestFloodOverHTTP(t *testing.T) {
	p, _ := newTestProgram(t, "--exec", "x=true", "--path", "/metrics", "--path", "/other")
	s := p.sources[0]
	var runs atomic.Int32
	gate := make(chan bool)
	s.do = func(_ context.Context, r *result, _ []string) *failure {
		runs.Add(1)
		<-gate
		r.bodies = []*exposition{mustRead(t, "a{b=\"c\"} 1\n", false, told("x"))}
		return nil
	}
	server := httptest.NewServer(p)
	defer server.Close()
	const scrapers = 1000
	var scrapes sync.WaitGroup
	for i := range scrapers {
		scrapes.Go(func() {
			page := httpGet(t, server.URL+[]string{"/metrics", "/other"}[i%2])
			if strings.Count(page, "\na{") != 1 || !strings.Contains(page, "\na{exporter_name=\"x\",b=\"c\"} 1\n") {
				t.Errorf("a scraper got %q", page)
			}
		})
	}
	if !eventually(func() bool { return s.waiters() == scrapers }) {
		t.Fatalf("%d scrapes wait", s.waiters())
	}
	close(gate)
	scrapes.Wait()
	if n := runs.Load(); n != 1 {
		t.Errorf("%d runs, want 1", n)
	}
}

// ---- exec.go: Taking turns

// TestTurn serves those who wait for a turn: in order of arrival, but a client that waits once before the others of
// one that waits often, of whom some are refused. In a scene each word is one who comes, the first letter being the
// client; - after it means that it leaves, and > that the turn is passed on.
func TestTurn(t *testing.T) {
	for scene, want := range map[string]string{
		"a1 a2 a3 a4 > > > >":                      "a1 a2 a3 a4",
		"a1 a2 a3 a4 a2- a4- > >":                  "a1 a3",
		"a1 a2 a3 a4 a5 a6 b1 c1 > > > > > >":      "a1 no a5 no a6 b1 c1 a2 a3 a4", // three may wait
		"a1 b1 b2 a2 > > > >":                      "a1 b1 b2 a2",                   // both have one before
		"a1 a2 b1 b1- c1 > > >":                    "a1 c1 a2",
		"a1 b1 b2 c1 c2 d1 > > > > > >":            "a1 d1 b1 c1 b2 c2", // d asks for least
		"a1 b1 b2 a2 > >> > >":                     "a1 b1 a2 b2",       // b1 had it for longer
		"a1 > b1 > a2 a3 b2 > > >":                 "a1 b1 a2 b2 a3",
		"a1 a2 a3 a4 > a5 b1 > > > > > > > b2 > >": "a1 a2 b1 a3 a4 a5 b2",
	} {
		synctest.Test(t, func(t *testing.T) {
			turns := turn{most: 3}
			var got []string
			leave := map[string]context.CancelFunc{}
			for _, word := range strings.Fields(scene) {
				name, leaves := strings.CutSuffix(word, "-")
				switch {
				case word[0] == '>': // whoever has it, for so many seconds
					time.Sleep(time.Duration(len(word)) * time.Second)
					turns.pass()
				case leaves:
					leave[name]()
				default:
					ctx, cancel := context.WithCancel(t.Context())
					leave[name] = cancel
					go func() {
						switch turns.wait(ctx, name[:1]) {
						case nil:
							got = append(got, name)
						case errTooManyWait:
							got = append(got, "no "+name)
						}
					}()
				}
				synctest.Wait()
			}
			if got := strings.Join(got, " "); got != want {
				t.Errorf("%s: %s, want %s", scene, got, want)
			}
			if turns.taken || len(turns.waiting) > 0 {
				t.Errorf("%s: the turn is taken though nobody has it", scene)
			}
		})
	}
}

// TestTurnComesTooLate passes on a turn that comes in the moment its waiter leaves.
func TestTurnComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var turns turn
		for range 100 {
			ctx, leave := context.WithCancel(t.Context())
			turns.wait(ctx, "")
			go turns.wait(ctx, "")
			synctest.Wait()
			leave()
			turns.pass()
			if synctest.Wait(); turns.taken {
				t.Fatal("the turn is lost")
			}
		}
	})
}

// ---- exec.go: Files that flags name

// TestRefresh takes a changed file up, tells each fault of a broken one once, and tries that
// again until it is good, also when nothing shows that it has changed. It waits for no disk.
func TestRefresh(t *testing.T) {
	dir, log, last := t.TempDir(), &syncBuffer{}, ""
	name := writeFile(t, dir, "file", "one")
	fault := error(nil)
	w := &watched{files: []flagFile{{flag: "--flag", name: name}}, changed: func() {}}
	w.log = slog.New(slog.NewTextHandler(log, nil))
	w.set = func(files []flagFile) error {
		if fault == nil {
			last = string(files[0].text)
		}
		return fault
	}
	f := func(want string, logged int) {
		t.Helper()
		for range 3 {
			w.refresh(false)
		}
		if n := strings.Count(log.String(), "\n"); last != want || n != logged || w.broken.Load() != (fault != nil) {
			t.Errorf("has %q, want %q, broken %v, %d lines, want %d:\n%s", last, want, w.broken.Load(), n, logged, log)
		}
	}
	if err := w.load(); err != nil {
		t.Fatal(err)
	}
	replaceFile(t, dir, "file", "two")
	w.looking.Store(true) // the disk is slow
	f("one", 0)
	w.looking.Store(false)
	f("two", 1)
	os.WriteFile(name, []byte("three"), 0o644) // in its place, not renamed
	f("three", 2)
	replaceFile(t, dir, "file", "four")
	fault = errors.New("cannot be read")
	f("three", 3)
	fault = errors.New("is broken")
	f("three", 4)
	w.refresh(true) // at SIGHUP
	f("three", 5)
	fault = nil
	f("four", 6)
}

// ---- exec.go: Reading a body

// TestNextBuffer reads a body into a buffer that it just fits in once its size is known.
func TestNextBuffer(t *testing.T) {
	p, _ := newTestProgram(t, "--file", "x="+writeFile(t, t.TempDir(), "m.prom", strings.Repeat("metric 1\n", 1e5)))
	fetchOnce(p.sources[0])
	if buf := fetchOnce(p.sources[0]).bodies[0].buf; cap(buf)-len(buf) > cap(buf)/8 {
		t.Errorf("%d bytes are in a buffer of %d", len(buf), cap(buf))
	}
}

// ---- exec.go: Exporters

// TestSameAuthority follows redirects to the exporter, however it writes itself, with all
// headers, and to nobody else.
func TestSameAuthority(t *testing.T) {
	f := func(from, host, location string, follows bool) {
		t.Helper()
		first := httptest.NewRequest("GET", from, nil)
		first.Host = host
		first.Header.Set("Authorization", "x")
		to, _ := first.URL.Parse(location)
		next := &http.Request{URL: to, Header: http.Header{}}
		if err := stayThere(next, []*http.Request{first}); (err == nil) != follows {
			t.Errorf("%s, %s to %s: %v", from, host, location, err)
		} else if follows &&
			(next.URL.Host != first.URL.Host || next.Host != host || next.Header.Get("Authorization") != "x") {
			t.Errorf("%s, %s to %s: asks %s as %q", from, host, location, next.URL, next.Host)
		}
	}
	f("http://h/metrics", "", "/m", true)
	f("http://h/metrics", "", "http://h:80/m", true)
	f("http://h:80/metrics", "", "http://H/m", true)
	f("https://h/metrics", "", "https://h:443/m", true)
	f("http://h:9100/metrics", "", "http://h/m", false)
	f("http://h/metrics", "", "https://h/m", false)
	f("https://h/metrics", "", "http://h:443/m", false)
	f("http://h/metrics", "", "//h2/m", false)
	f("http://h/metrics", "", "http://h:8080/m", false)
	f("http://h:9100/metrics", "app.example", "http://app.example/m", true)
	f("http://h:9100/metrics", "app.example", "http://App.example:9100/m", true)
	f("http://h:9100/metrics", "app.example:8080", "http://app.example:8080/m", true)
	f("http://h:9100/metrics", "app.example", "http://h:9100/m", true)
	f("http://h:9100/metrics", "app.example", "https://app.example/m", false)
	f("http://h:9100/metrics", "app.example", "http://app.example:8080/m", false)
	f("http://[fe80::1%25eth0]:9100/metrics", "", "http://[fe80::1%25eth0]:9100/m", true)
}

// TestReconnect closes the kept connection to an exporter at SIGHUP and every five minutes, or after
// each answer if a header says so.
func TestReconnect(t *testing.T) {
	closed := make(chan bool, 1)
	server := httptest.NewUnstartedServer(answer("a 1\n"))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			closed <- true
		}
	}
	server.Start()
	defer server.Close()
	p, _ := newTestProgram(t, "--http", "x="+server.URL,
		"--http", "single="+server.URL, "--header", "single:Connection: close")
	for _, s := range p.sources {
		if r := fetchOnce(s); r.failure != nil {
			t.Fatal(r.failure.err)
		}
	}
	<-closed // of the second
	p.sources[0].fetcher.(*exporter).reconnect()
	<-closed
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		hangup := make(chan os.Signal)
		go p.follow(ctx, hangup)
		for _, wait := range []time.Duration{4 * time.Minute, 0, 5*time.Minute - 1} {
			before := p.sources[0].fetcher.(*exporter).transport.Load()
			if wait == 0 {
				hangup <- syscall.SIGHUP
			}
			time.Sleep(wait)
			synctest.Wait()
			if p.sources[0].fetcher.(*exporter).transport.Load() == before != (wait == 4*time.Minute) {
				t.Errorf("after %v: connections are kept or not against the rule", wait)
			}
		}
		cancel()
	})
}

// TestAddresses tries all addresses of an exporter's name, though some hang or IPv6 ones are not
// told, and names the name server if it says nothing.
func TestAddresses(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.77:0")
	if err != nil {
		t.Skip(err)
	}
	go http.Serve(l, answer("a 1\n"))
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	hangs, _ := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	defer syscall.Close(hangs)
	addr := &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 78}}
	if err := cmp.Or(syscall.Bind(hangs, addr), syscall.Listen(hangs, 0)); err != nil {
		t.Skip(err)
	}
	for range 2 { // its queue is full then
		if conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.78:%d", port), time.Second); err == nil {
			defer conn.Close()
		}
	}
	p, _ := newTestProgram(t, "--http", fmt.Sprintf("x=http://many.test:%d", port), "--timeout", "3s")
	var known []netip.Addr
	p.sources[0].fetcher.(*exporter).lookup = func(ctx context.Context, version, host string) ([]netip.Addr, error) {
		if version == "ip4" && known != nil {
			return known, nil
		}
		<-ctx.Done()
		return nil, &net.DNSError{Name: host, Err: "i/o timeout", IsTimeout: true}
	}
	for range 9 {
		known = append(known, netip.MustParseAddr("127.0.0.78"))
	}
	known = append(known, netip.MustParseAddr("127.0.0.77"))
	if r := fetchOnce(p.sources[0]); r.failure != nil {
		t.Errorf("after 9 others: %v", r.failure.err)
	}
	known = nil
	p.sources[0].fetcher.(*exporter).reconnect()
	wantContains(t, get(t, p, "/metrics").Body.String(),
		"down: x: connect: lookup many.test: no answer; does the name server answer?\n")
}

// TestSilentHandshake ends a fetch of an exporter that says nothing in the handshake of TLS.
func TestSilentHandshake(t *testing.T) {
	l := must(net.Listen("tcp", "127.0.0.1:0")) // it accepts no connection, but the system does
	defer l.Close()
	p, _ := newTestProgram(t, "--http", "x=https://"+l.Addr().String()+"/", "--timeout", "100ms")
	wantContains(t, get(t, p, "/metrics").Body.String(), "down: x: timeout: ")
	err := &net.OpError{Op: "dial", Err: syscall.ETIMEDOUT}
	if f := p.sources[0].fetcher.(*exporter).failure(err); f.reason != "connect" {
		t.Errorf("%s: %v", f.reason, f.err)
	}
}

// ---- exec.go: Files

// TestFileFaults makes a panic while a file is read a failure of its source, one of a glob, too.
func TestFileFaults(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir, "a.prom", "a 1\n")
	for _, pattern := range []string{"/a.prom", "/*.prom"} {
		p, _ := newTestProgram(t, "--file", "x="+dir+pattern)
		p.workspaces.New = func() any { panic("as told") }
		r := fetchOnce(p.sources[0])
		f := r.failure
		if f == nil || f.reason != "internal" || len(r.bodies) > 0 || !strings.Contains(f.detail, "goroutine") {
			t.Errorf("%s: %v", pattern, f)
		}
	}
}

// TestHungFile leaves out the file of a glob whose read has cost an earlier fetch its time, until it comes back.
func TestHungFile(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b", "c"} {
		writeFile(t, dir, name+".prom", name+" 1\n")
	}
	synctest.Test(t, func(t *testing.T) {
		p, _ := newTestProgram(t, "--file", "x="+dir+"/*.prom")
		disk := make(chan bool)
		var reads atomic.Int32
		p.workspaces.New = func() any {
			if reads.Add(1) == 1 {
				<-disk
			}
			return nil
		}
		f := func(ctx context.Context, samples int, fault string) {
			t.Helper()
			r := &result{}
			r.failure = p.sources[0].do(ctx, r, nil)
			if r.samples() != samples || (r.failure == nil) != (fault == "") {
				t.Errorf("%d samples, want %d, %v", r.samples(), samples, r.failure)
			} else if fault != "" {
				wantContains(t, r.failure.err.Error(), fault)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		f(ctx, 0, "a.prom: its read does not come back")
		f(t.Context(), 2, "a.prom: its read does not come back")
		close(disk)
		synctest.Wait()
		f(t.Context(), 3, "")
		hangs := p.sources[0].fetcher.(*files).hangs
		for i := range 16 {
			hangs[strconv.Itoa(i)] = true
		}
		f(t.Context(), 0, "a.prom")
	})
}

// TestManyFiles holds of many small files not much more than what is in them, and does not go on
// reading after the end of its time.
func TestManyFiles(t *testing.T) {
	dir := t.TempDir()
	for i := range 100 {
		writeFile(t, dir, fmt.Sprintf("%d.prom", i), fmt.Sprintf("m%d 1\n", i))
	}
	p, _ := newTestProgram(t, "--file", "x="+dir+"/*.prom")
	fetch := p.sources[0].fetcher.fetch
	r := &result{}
	if f := fetch(t.Context(), r, nil); f != nil || len(r.bodies) != 100 {
		t.Fatalf("%d bodies, %v", len(r.bodies), f)
	}
	for _, e := range r.bodies {
		if cap(e.buf) > 2*len(e.buf) {
			t.Fatalf("%d bytes for %q", cap(e.buf), e.buf)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r = &result{}
	if f := fetch(ctx, r, nil); f == nil || len(r.files) > 1 {
		t.Errorf("%d files were opened, %v", len(r.files), f)
	}
}

// TestFileChanges takes nothing of a file that is written while it is read, and all of one that is renamed away.
func TestFileChanges(t *testing.T) {
	text := strings.Repeat("metric 1\n", windowSize)
	f := func(samples int, reason string, change func(path string) error) {
		t.Helper()
		path := writeFile(t, t.TempDir(), "m.prom", text)
		p, _ := newTestProgram(t, "--file", "x="+path)
		r := &result{}
		asked := 0
		ctx := askedContext{context.Background(), func() (err error) {
			if asked++; asked == 2 { // between the first read and the second
				err = change(path)
			}
			return err
		}}
		got := ""
		if f := p.sources[0].fetcher.(*files).read(ctx, r, path); f != nil {
			got = f.reason
		}
		if got != reason || r.samples() != samples {
			t.Errorf("%d samples, reason %q, want %d, %q", r.samples(), got, samples, reason)
		}
	}
	f(0, "file", func(path string) error { return os.Truncate(path, int64(len(text)/2)) })
	f(0, "file", func(path string) error { return os.WriteFile(path, []byte(text+"more 1\n"), 0o644) })
	f(0, "file", func(path string) error { // with the same size
		if err := os.WriteFile(path, []byte(strings.Repeat("metric 2\n", windowSize)), 0o644); err != nil {
			return err
		}
		return os.Chtimes(path, time.Time{}, time.Unix(1, 0)) // the clock of the disk may be coarse
	})
	f(windowSize, "", func(path string) error { return os.Rename(path, path+".old") })
}

// ---- exec.go: Commands

func TestSplitWords(t *testing.T) {
	f := func(line string, want ...string) {
		t.Helper()
		words, err := splitWords(line)
		if err != nil || !slices.Equal(words, want) {
			t.Errorf("%s: %q, %v, want %q", line, words, err, want)
		}
	}
	f(``)
	f(`  a	b
 c `, "a", "b", "c")
	f(`'a b' "c d"e f\ g`, "a b", "c de", "f g")
	f(`'\' "\\ \" \$ \x" \\ \'`, `\`, `\ " $ \x`, `\`, `'`)
	f(`'' "" a''`, "", "", "a")
	f("a\\\nb \"c\\\nd\"", "ab", "cd")
	f("a \\\n  b \\\n\tc \"\\\n\" \\\n", "a", "b", "c", "")
	f("$HOME `x` * # ~ a|b http://h/?a=1&b=2", "$HOME", "`x`", "*", "#", "~", "a|b", "http://h/?a=1&b=2")
	f(`'|' "||" \; '>x' "2>&1" 'a;' {{l="x"}} /a=b`, "|", "||", ";", ">x", "2>&1", "a;", `{{l=x}}`, "/a=b")
	for _, line := range []string{`'a`, `"a`, `a\`, `"a\`, `"a\"`} {
		if words, err := splitWords(line); err == nil {
			t.Errorf("%s: taken as %q", line, words)
		}
	}
}

// TestOtherGroup ends a command that has gone to the group of its parent, though it ignores SIGTERM.
func TestOtherGroup(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cmd := inGroup(ctx, []string{"sh", "-c", "trap '' TERM; echo; exec sleep 100"})
	cmd.SysProcAttr = nil // its group is that of the test, not its own
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	io.ReadFull(out, make([]byte, 1)) // the trap is set
	cancel()
	if err := cmd.Wait(); err == nil || signalGroup(cmd, 0) {
		t.Errorf("ended with %v, or has a group", err)
	}
}

// TestLatePipe reads what is left in a pipe whose deadline has passed, and tells whether more could come.
func TestLatePipe(t *testing.T) {
	text := strings.Repeat("x", 60<<10)
	for _, open := range []bool{true, false} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer w.Close()
		io.WriteString(w, text)
		if !open {
			w.Close()
		}
		r.SetReadDeadline(time.Unix(1, 0))
		if got, more := readPipe(r, 1<<20); string(got) != text || more != open {
			t.Errorf("read %d bytes of %d, more %v, want %v", len(got), len(text), more, open)
		}
	}
}

// TestManyCommands has no pipe of a command that has ended held by others that are being started.
func TestManyCommands(t *testing.T) {
	p, _ := newTestProgram(t, "--exec", "x=true")
	c := p.sources[0].fetcher.(*command)
	var runs sync.WaitGroup
	for range 200 {
		runs.Go(func() {
			cmd := exec.Command("true")
			out, errs, err := c.start(cmd)
			if err != nil {
				t.Error(err)
				return
			}
			defer out.Close()
			defer errs.Close()
			cmd.Wait()
			out.SetReadDeadline(time.Unix(1, 0))
			if _, open := readPipe(out, 1); open {
				t.Error("somebody holds the pipe")
			}
		})
	}
	runs.Wait()
}

func FuzzCommand(f *testing.F) {
	for _, line := range []string{`a 'b c' "d \" e" f\ g`, `x {disk} {disk} p={a=b|c}{{}}`, `"a\`, `{`, ``} {
		f.Add(line, "value")
	}
	f.Fuzz(func(t *testing.T, line, value string) {
		c, err := parseCommand(line)
		if err != nil {
			return
		}
		query := url.Values{}
		for _, p := range c.params {
			query[p.name] = []string{value}
		}
		chosen, err := c.arguments(query, accept{})
		if err != nil {
			// A shorter value may be a word of the error by chance.
			if len(value) > 40 && strings.Contains(err.Error(), value) && !strings.Contains(line, value) {
				t.Errorf("the error repeats the value: %v", err)
			}
			return
		}
		if args := c.args(chosen.values); len(args) != len(c.words) {
			t.Errorf("%d words became %q", len(c.words), args)
		}
	})
}

// ---- exec.go: Counts

// TestFlapping logs each change of a source's state at once, and sums up those of one that changes all the time.
func TestFlapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, log := newTestProgram(t, "--exec", "x=true")
		n := 0
		p.sources[0].do = func(context.Context, *result, []string) *failure {
			if n++; n%2 == 0 || n > 60 {
				return nil
			}
			return fail("exit", "as told")
		}
		f := func(times, want int, when string) {
			t.Helper()
			for range times {
				get(t, p, "/metrics", timeoutHeader, "2")
				time.Sleep(20 * time.Second)
			}
			synctest.Wait()
			if n := strings.Count(log.String(), "source is "); n != want {
				t.Errorf("%d changes are logged %s, want %d:\n%s", n, when, want, log)
			}
		}
		f(5, 5, "at first")
		f(55, 5, "while there are too many")
		f(40, 6, "after all is calm")
		wantContains(t, log.String(), `msg="source is up" exporter_name=x samples=0 unlogged_changes=54`)
		if n := strings.Count(log.String(), "longer than the deadline"); n != 1 {
			t.Errorf("a --timeout that is too long is logged %d times:\n%s", n, log)
		}
	})
}

// TestOverviewSince has a state begin when it changes between up and down, and not when the reason does.
func TestOverviewSince(t *testing.T) {
	st := status{failures: map[string]uint64{}}
	start := time.Now()
	for i, step := range []struct {
		failure *failure
		since   int // the step that began the state
	}{
		{nil, 0}, {nil, 0}, {fail("connect", "x"), 2}, {fail("timeout", "y"), 2}, {nil, 4}, {nil, 4},
	} {
		at := start.Add(time.Duration(i) * time.Minute)
		st.count(true, &result{start: at, end: at, failure: step.failure})
		st.count(false, &result{start: at, end: at, failure: fail("parse", "of another's arguments")})
		if want := start.Add(time.Duration(step.since) * time.Minute); !st.since.Equal(want) {
			t.Errorf("step %d: the state holds since %v, want %v", i, st.since, want)
		}
	}
	if st.lastFailure.reason != "timeout" || !st.lastFailureTime.Equal(start.Add(3*time.Minute)) {
		t.Errorf("the last failure is %v at %v", st.lastFailure, st.lastFailureTime)
	}
}

// ---- merge.go: Merging

// TestCases merges the *.prom files of each folder of testdata/cases, each one a source of its file's name, with the
// flags in the file flags, if there is one. The strict page, without status metrics, and the failures are to be as in
// want; what Prometheus gets is to be as in want.prometheus, which is there if that differs. Where there is a
// want.protobuf, the page of protobuf is to be as in it, in words.
func TestCases(t *testing.T) {
	for _, dir := range glob(t, "testdata/cases/*") {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			flags, _ := os.ReadFile(dir + "/flags")
			args := strings.Fields(string(flags))
			for _, file := range glob(t, dir+"/*.prom") {
				args = append(args, "--file", strings.TrimSuffix(filepath.Base(file), ".prom")+"="+file)
			}
			p, _ := newTestProgram(t, args...)
			strict, exact := mergeCase(p, dir, strictForm), mergeCase(p, dir, textForm)
			if slices.ContainsFunc(p.sources, func(s *source) bool { return fetchOnce(s).openMetrics() }) {
				exact = mergeCase(p, dir, openMetricsForm)
			}
			wantFile(t, dir+"/want", strict)
			if _, err := os.Stat(dir + "/want.prometheus"); err == nil || exact != strict {
				wantFile(t, dir+"/want.prometheus", exact)
			}
			if _, err := os.Stat(dir + "/want.protobuf"); err == nil {
				wantFile(t, dir+"/want.protobuf", inWords(mergeCase(p, dir, protobufForm)))
			}
		})
	}
}

// mergeCase returns the page of all sources, and a line for each failure.
func mergeCase(p *program, dir string, f form) string {
	var bodies []*exposition
	var failures strings.Builder
	for _, s := range p.sources {
		r := fetchOnce(s)
		bodies = append(bodies, r.bodies...)
		if r.failure != nil {
			err := strings.ReplaceAll(r.failure.err.Error(), dir+"/", "")
			fmt.Fprintf(&failures, "FAILED %s: %s: %s\n", s.name, r.failure.reason, err)
		}
	}
	return pageText(pageOf(f, bodies...)) + failures.String()
}

// TestAsIfScrapedDirectly puts any mix of real scrapes on both pages, with TYPE lines changed or
// removed. As it came, the page has what Prometheus 3 stores of each body alone: samples, labels,
// timestamps and exemplars, and types and units if no two bodies differ. The strict page has the
// same but for what text cannot carry, with label values as they were written.
func TestAsIfScrapedDirectly(t *testing.T) {
	files := slices.Concat(glob(t, "testdata/scrapes/*.prom"), glob(t, "testdata/openmetrics/*.prom"))
	texts := readFiles(t, files...)
	rnd := rand.New(rand.NewPCG(1, 2))
	typeLine := regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)\n`)
	for range 40 {
		changed := rnd.IntN(2) == 0 // or only removed
		var bodies []*exposition
		var all []direct
		for i := range 1 + rnd.IntN(5) {
			text := texts[rnd.IntN(len(texts))]
			text = typeLine.ReplaceAllFunc(text, func(line []byte) []byte {
				switch n := rnd.IntN(20); {
				case n == 0:
					return nil
				case n == 1 && changed && !endsOpenMetrics(text):
					kind := []string{"gauge", "counter", "summary", "histogram", "untyped"}[rnd.IntN(5)]
					return typeLine.ReplaceAll(line, []byte("# TYPE $1 "+kind+"\n"))
				}
				return line
			})
			source := "s" + strconv.Itoa(i)
			bodies = append(bodies, mustRead(t, string(text), endsOpenMetrics(text), told(source)))
			all = append(all, storedOf(string(text), endsOpenMetrics(text), source))
		}
		f := textForm
		if slices.ContainsFunc(bodies, func(e *exposition) bool { return e.openMetrics }) {
			f = openMetricsForm
		}
		exact, strict := pageOf(f, bodies...), pageOf(strictForm, bodies...)
		wantStored(t, all, pageText(exact), f)
		wantStored(t, all, pageText(strict), strictForm)
		checkShape(t, pageText(strict))
		if pageText(pageOf(strictForm, bodies...)) != pageText(strict) {
			t.Error("a second page differs")
		}
		if !changed && len(exact.pairs) > 0 {
			t.Errorf("conflicts where types are only removed: %v", slices.Collect(maps.Keys(exact.pairs)))
		}
		told := storedOf(pageText(exact), f.openMetrics, "").metadata
		for i, d := range all {
			for line, hasSamples := range d.metadata {
				isStart := strings.Contains(line, "_created ") // of text, under a type that has start times
				if hasSamples && !told[line] && len(exact.pairs) == 0 && !isStart {
					t.Errorf("source %d: not on the page: %s", i, line)
				}
			}
		}
	}
}

// TestWorstCases finds all samples of bodies that are large or odd on their pages.
func TestWorstCases(t *testing.T) {
	for _, c := range worstCases {
		t.Run(c.name, func(t *testing.T) {
			body, samples := c.body(20000)
			e := mustRead(t, body, false, &addedLabels{})
			if e.samples != samples {
				t.Errorf("%d samples, want %d", e.samples, samples)
			}
			for _, f := range []form{textForm, strictForm} {
				if page := wantPage(t, samples, f, e); len(page) > 10*len(body)+1000 {
					t.Errorf("a page of %d bytes, of %d", len(page), len(body))
				}
			}
		})
	}
}

// BenchmarkMerge makes a page of bodies that have been read, in each format.
func BenchmarkMerge(b *testing.B) {
	for _, w := range workloads(b) {
		var bodies []*exposition
		for i, body := range w.bodies {
			bodies = append(bodies, mustRead(b, string(body), endsOpenMetrics(body), told(strconv.Itoa(i))))
		}
		for _, f := range []form{textForm, openMetricsForm} {
			b.Run(fmt.Sprintf("%s/OpenMetrics=%v", w.name, f.openMetrics), func(b *testing.B) {
				b.SetBytes(int64(pageOf(f, bodies...).size))
				b.ReportAllocs()
				for b.Loop() {
					pageOf(f, bodies...)
				}
			})
		}
	}
}

// FuzzMerge merges two bodies, with and without a label that tells them apart, in both formats.
func FuzzMerge(f *testing.F) {
	others := []string{
		"# HELP h Other.\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_count 1\n",
		"# TYPE a gauge\na 1\n# TYPE h_count counter\nh_count 2\n",
		"h_bucket{le=\"x\"} 1\na{b=\"c\"} 1\n{\"a.b\"} 1\na_b 2\n",
		"# TYPE foo counter\nfoo_total 1 5 # {a=\"b\"} 1\nfoo_created 2\n# TYPE h info\nh_info 1\n# EOF\n",
		"# TYPE foo gauge\nfoo 1\n# TYPE foo_total gauge\nfoo_total 1 1700000000123\n" +
			"# TYPE h_created gauge\nh_created 1\n",
		"foo_total 1\n# TYPE a_total counter\na_total -1\n# TYPE s stateset\ns{s=\"a\"} 1\n# EOF\n",
	}
	i := 0
	seeds(f, func(text []byte, openMetrics bool) {
		other := []byte(others[i%len(others)])
		f.Add(text, openMetrics, other, endsOpenMetrics(other))
		i++
	})
	own := ownMetrics{}
	for _, name := range []string{"a", "a_b", "foo_info", "h", "process_open_fds"} {
		own.add(name, gauge, "Own.", 1, "x", "y")
		own.add(name, gauge, "Own.", 2, "b", "c")
	}
	own.add("foo_total", counter, "Own.", 1, "x", "y")
	f.Fuzz(func(t *testing.T, one []byte, oneOpenMetrics bool, other []byte, otherOpenMetrics bool) {
		var apart, raw []*exposition
		samples := 0
		for i, text := range [][]byte{one, other} {
			openMetrics := []bool{oneOpenMetrics, otherOpenMetrics}[i]
			e, err := read(string(text), openMetrics, told(strconv.Itoa(i)))
			if err != nil {
				return
			}
			apart = append(apart, e)
			samples += e.samples
			raw = append(raw, mustRead(t, string(text), openMetrics, &addedLabels{}))
		}
		wantPlain(t, apart, [][]byte{one, other}, oneOpenMetrics, otherOpenMetrics)
		for _, f := range allForms {
			page := wantPage(t, samples, f, apart...)
			first, second := pageText(pageOf(f, apart[0])), pageText(pageOf(f, apart[1]))
			wantSamples(t, page, f.openMetrics, strings.TrimSuffix(first, "# EOF\n")+second, f.openMetrics)
			wantPage(t, samples, f, raw...)
			wantOwn(t, own.read(false), samples, f, raw)
		}
	})
}

// wantOwn wants a page that has all of the program's own samples, whatever sources have under the
// same names, and all others but for the same series.
func wantOwn(t *testing.T, own *exposition, samples int, f form, bodies []*exposition) {
	t.Helper()
	all := slices.Concat([]*exposition{own}, bodies)
	page := samplesOf(t, wantPage(t, own.samples+samples, f, all...), f.openMetrics)
	for _, sample := range samplesOf(t, pageText(pageOf(textForm, own)), false) {
		if !slices.Contains(page, sample) {
			t.Fatalf("%s is lost on\n%s", sample, strings.Join(page, "\n"))
		}
	}
}

// ---- merge.go: Sharing pages

// opener opens pages of a result for a test.
type opener struct {
	*testing.T
	client  string
	came    time.Time
	p       *program
	sources []*source
}

func newOpener(t *testing.T, args ...string) *opener {
	p, _ := newTestProgram(t, append(args, backup)...)
	return &opener{T: t, p: p, sources: p.sources}
}

// open opens a page as a scrape does.
func (o *opener) open(ctx context.Context, r *result, takes accept, gzip bool) (*sharedPage, error) {
	tickets := []*ticket{{waterfall: &o.sources[0].waterfall, got: r}}
	return o.p.pages.open(ctx, &pageRequest{client: o.client, came: o.came, sources: o.sources, tickets: tickets,
		takes: takes, gzip: gzip, program: o.p.about(), process: o.p.processNow()})
}

// page opens a page, for which there is to be room in the end.
func (o *opener) page(r *result, gzip bool) *sharedPage {
	sp, err := o.open(o.Context(), r, accept{}, gzip)
	if err != nil {
		o.Error(err)
	}
	return sp
}

// wantIdle wants no page alive, and the turn to render free.
func wantIdle(t *testing.T, p *program, when string) {
	t.Helper()
	if n := len(p.pages.alive); n != 0 || p.pages.turn.taken {
		t.Errorf("%s: %d pages alive, turn taken %v", when, n, p.pages.turn.taken)
	}
}

// TestPages lets eight pages be alive. Who needs one more waits until a page is closed, or
// the oldest is half a second old and its readers are cut off.
func TestPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOpener(t)
		p := o.p
		var all []*sharedPage
		open := func() { all = append(all, o.page(&result{}, false)) }
		for range maxPages {
			open()
			time.Sleep(readTime / 10)
		}
		begin := time.Now()
		soon, cancel := context.WithTimeout(t.Context(), readTime/10)
		defer cancel()
		_, err := o.open(soon, &result{}, accept{}, false)
		if d := time.Since(begin); err != context.DeadlineExceeded || d != readTime/10 {
			t.Errorf("waited %v for room: %v", d, err)
		}
		open()
		if d := time.Since(begin); d != readTime*2/10 || all[0].ctx.Err() == nil || all[1].ctx.Err() != nil {
			t.Errorf("the ninth page came after %v", d)
		}
		p.pages.close(all[0], "") // as its reader does, who was cut off
		begin = time.Now()
		go open()
		synctest.Wait()
		if len(all) != 9 {
			t.Error("there are nine pages")
		}
		p.pages.close(all[5], "")
		synctest.Wait()
		if len(all) != 10 || len(p.pages.alive) != maxPages || time.Since(begin) != 0 {
			t.Errorf("%d pages opened, %d alive after one was closed", len(all), len(p.pages.alive))
		}
		for i, sp := range all {
			if cut := sp.ctx.Err() != nil; cut != (i == 0 || i == 5) {
				t.Errorf("page %d: cut off %v", i, cut)
			}
		}
	})
}

// TestWhoIsCutOff cuts off readers of the client that reads most pages, and of others the one that
// has not read for longest; one that reads is not cut off for those who do not.
func TestWhoIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOpener(t)
		pages := &o.p.pages
		var all []*sharedPage
		for _, client := range strings.Fields("honest a b greedy greedy c d e f g") {
			o.client = client
			all = append(all, o.page(&result{}, false))
			time.Sleep(readTime)
			pages.progress(all[0])
		}
		for i, sp := range all {
			if cut := sp.ctx.Err() != nil; cut != (i == 3 || i == 1) { // a greedy one, then the one that stopped first
				t.Errorf("page %d: cut off %v", i, cut)
			}
		}
	})
}

// TestPageIsShared gives one page to all who would get the same, compressed once and only
// if somebody wants that, until the last of them closes it.
func TestPageIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOpener(t)
		p, r := o.p, &result{}
		first, second := o.page(r, false), o.page(r, false)
		if first != second || first.zipped != nil {
			t.Errorf("two plain scrapes: one page %v, compressed %v", first == second, first.zipped != nil)
		}
		time.Sleep(readTime)
		third, fourth := o.page(r, true), o.page(r, true)
		if third != first || fourth != first {
			t.Error("compressed scrapes have another page")
		}
		if o.came = first.made.Add(time.Second); o.page(r, false) != first { // it is half a second old
			t.Error("a scrape that came later does not share a page of this second")
		}
		p.pages.close(first, "")
		if time.Since(first.read) != 0 {
			t.Error("who waited until a page was compressed may be cut off at once")
		}
		unzipped, _ := gzip.NewReader(strings.NewReader(pageText(first.zipped)))
		plain, _ := io.ReadAll(unzipped)
		if string(plain) != pageText(first.page) || !bytes.Contains(plain, []byte("reverse_exporter_source_up")) {
			t.Errorf("compressed it is\n%s", plain)
		}
		body := mustRead(t, string(generate(50, 100)), false, &addedLabels{})
		time.Sleep(time.Second)
		later := o.page(r, false)
		o.came = time.Time{}
		if later == first || o.page(r, false) != first {
			t.Error("a scrape shares a page that was made long before it came, or none made after that")
		}
		p.pages.close(later, "")
		p.pages.close(first, "")
		big := o.page(&result{bodies: []*exposition{body}}, true)
		if big == first || big.zipped == nil {
			t.Error("another result has the same page, or one that is not compressed")
		}
		p.pages.close(big, "")
		big = o.page(&result{bodies: []*exposition{body}}, true)
		for _, sp := range []*sharedPage{first, second, third} {
			p.pages.close(sp, "")
			if sp.ctx.Err() != nil || !slices.Contains(p.pages.alive, sp) {
				t.Error("a page is dropped though a reader is left")
			}
		}
		p.pages.close(fourth, "")
		if first.ctx.Err() == nil || slices.Contains(p.pages.alive, first) {
			t.Error("a page is kept though all its readers left")
		}
	})
}

// TestPagesDiffer gives scrapes pages of their own where the same results look different: for
// other sources, as it came and strict, and for scrapers that know quoted names if there are any.
func TestPagesDiffer(t *testing.T) {
	o := newOpener(t, "--file", "other=x")
	quoted := &result{bodies: []*exposition{mustRead(t, "{\"a.b\"} 1\n", false, &addedLabels{})}}
	var opened []*sharedPage
	for _, want := range []struct {
		source   int
		r        *result
		escaping string
		page     int // which of those opened
	}{
		{0, late, "", 0}, {1, late, "", 1}, {0, late, "", 0}, {0, late, "allow-utf-8", 2}, {0, late, "dots", 2},
		{0, quoted, "dots", 3}, {0, quoted, "allow-utf-8", 4}, {0, quoted, "dots", 3}, {0, quoted, "", 5},
	} {
		o.sources = o.p.sources[want.source : want.source+1]
		sp := must(o.open(t.Context(), want.r, accept{escaping: want.escaping}, false))
		i := slices.Index(opened, sp)
		if i < 0 {
			i = len(opened)
			opened = append(opened, sp)
		}
		if i != want.page {
			t.Errorf("%+v: page %d", want, i)
		}
	}
	wantContains(t, pageText(opened[3].page), "\na_b 1\n")
	wantContains(t, pageText(opened[4].page), "\n{\"a.b\"} 1\n")
	wantContains(t, pageText(opened[5].page), "\na_b 1\n")
}

// TestWaitingForPages lets scrapes wait for a page in the making: they hold no result and
// get the one page that the first of them makes.
func TestWaitingForPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOpener(t)
		p, r := o.p, &result{}
		p.pages.turn.wait(t.Context(), "") // somebody renders
		var mu sync.Mutex                  // guards opened and pages
		var opened []*sharedPage
		pages := map[*page]bool{} // plain and compressed
		for i := range 100 {
			go func() {
				sp := o.page(r, i%2 == 0)
				mu.Lock()
				defer mu.Unlock()
				opened = append(opened, sp)
				if pages[sp.page] = true; i%2 == 0 {
					pages[sp.zipped] = true
				}
			}()
			synctest.Wait()
		}
		if len(opened) != 0 {
			t.Errorf("%d scrapes have a page", len(opened))
		}
		p.pages.turn.pass()
		synctest.Wait()
		if len(opened) != 100 || len(pages) != 2 {
			t.Errorf("%d scrapes have a page, of %d, compressed or not", len(opened), len(pages))
		}
		for _, sp := range opened {
			p.pages.close(sp, "")
		}
		wantIdle(t, p, "when all pages are closed")
	})
}

// TestRenderEnds stops a render whose scraper has no more time, wherever it is, and leaves nothing of it.
func TestRenderEnds(t *testing.T) {
	o := newOpener(t)
	p := o.p
	body := mustRead(t, string(generate(10, 100)), false, &addedLabels{})
	r := &result{bodies: []*exposition{body, body}} // which have the same series
	for looks, ended := 0, true; ended; looks++ {
		left := looks
		ctx := askedContext{context.Background(), func() error {
			if left--; left < 0 {
				return context.Canceled
			}
			return nil
		}}
		sp, err := o.open(ctx, r, accept{}, true)
		if ended = err != nil; !ended {
			if least := strings.Count(pageText(sp.page), "# TYPE ") + len(sp.chunks); looks < least {
				t.Errorf("%d looks at the context, want one for each family and each chunk, %d", looks, least)
			}
			p.pages.close(sp, "")
		} else if err != context.Canceled || sp != nil {
			t.Fatalf("%v, %v", sp, err)
		}
		if wantIdle(t, p, fmt.Sprintf("ended after %d looks", looks)); t.Failed() {
			t.FailNow()
		}
	}
	func() {
		defer func() { recover() }()
		o.sources = []*source{nil}
		o.open(t.Context(), r, accept{}, false)
		t.Error("there is a page of no source")
	}()
	wantIdle(t, p, "after a panic")
}

// TestPageDeadline answers before the timeout of a scrape that waits for a page: later, nobody would see why.
func TestPageDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := newTestProgram(t, backup)
		p.pages.turn.wait(t.Context(), "") // somebody renders
		begin := time.Now()
		w := get(t, p, "/metrics", timeoutHeader, "1")
		if d := time.Since(begin); d < 950*time.Millisecond || d >= time.Second || w.Code != 503 {
			t.Errorf("%d after %v, want 503 just before a second is over", w.Code, d)
		}
		wantContains(t, w.Body.String(), "no page could be made before the deadline")

		ctx, leave := context.WithCancel(t.Context())
		var got any
		go func() {
			defer func() { got = recover() }()
			p.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/metrics", nil).WithContext(ctx))
		}()
		synctest.Wait()
		leave()
		synctest.Wait()
		if got != http.ErrAbortHandler {
			t.Errorf("who has left gets an answer: %v", got)
		}
		p.pages.turn.pass()
		if w := get(t, p, "/metrics", timeoutHeader, "1"); w.Code != 200 {
			t.Errorf("%d though nobody renders", w.Code)
		}
	})
}

// ---- main.go: Running

// TestInit runs the program as PID 1 of a namespace of its own: no orphan stays a
// zombie, every command is judged right, and signals arrive.
func TestInit(t *testing.T) {
	t.Parallel()
	unshare, err := exec.LookPath("unshare")
	if err != nil || exec.Command(unshare, "--pid", "--fork", "--mount-proc", "true").Run() != nil {
		t.Skip("no PID namespace can be made here")
	}
	startAsInit := func(args ...string) *started {
		t.Helper()
		cmd := programCommand("", nil, args...)
		cmd.Args = append([]string{unshare, "--pid", "--fork", "--kill-child", "--mount-proc"}, cmd.Args...)
		cmd.Path = unshare
		return start(t, cmd)
	}
	dir := t.TempDir()
	token := writeFile(t, dir, "token", "one")
	orphans := writeFile(t, dir, "orphans",
		"#!/bin/sh\n(sleep 0.01 &)\nsetsid sh -c 'sleep 0.01 &' &\nwait\necho a 1\n")
	judged := writeFile(t, dir, "judged", "#!/bin/sh\necho b 1\nexit $1\n")
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		s := startAsInit("--exec", "orphans="+orphans,
			"--exec", "judged="+judged+" {code=0}", "--path", "judged:/judged",
			"--http", "x=http://127.0.0.1:1", "--bearer-token-file", "x:"+token, "--path", "x:/x")
		for i := range 100 {
			if body := httpGet(t, s.url+"/metrics"); !strings.Contains(body, `source_up{exporter_name="orphans"} 1`) {
				t.Fatalf("run %d:\n%s", i, body)
			}
			for code, want := range []string{`source_up{exporter_name="judged"} 1`, "down: judged: exit"} {
				if body := httpGet(t, fmt.Sprint(s.url, "/judged?code=", code)); !strings.Contains(body, want) {
					t.Fatalf("run %d with exit status %d is judged wrong:\n%s", i, code, body)
				}
			}
		}
		init := childrenOf(t, s.Process.Pid)
		if len(init) != 1 {
			t.Fatalf("unshare has the children %v", init)
		}
		if !eventually(func() bool { return len(childrenOf(t, init[0])) == 1 }) { // the program itself
			t.Fatalf("PID 1 has the children %v, want one", childrenOf(t, init[0]))
		}
		begun := time.Now()
		for n := 1; n <= 3; n++ { // every 5 s it would look without a signal
			replaceFile(t, dir, "token", strconv.Itoa(n))
			syscall.Kill(init[0], syscall.SIGHUP)
			eventually(func() bool { return strings.Count(s.log.String(), "reloaded a changed file") == n })
		}
		if d := time.Since(begun); d > 8*time.Second {
			t.Errorf("three times SIGHUP took %v:\n%s", d, &s.log)
		}
		syscall.Kill(init[0], sig)
		if err := s.Wait(); err != nil {
			t.Errorf("after %v: %v", sig, err)
		}
	}
	s := startAsInit("--file", "x=/nowhere")
	if init := childrenOf(t, s.Process.Pid); len(init) != 1 || len(childrenOf(t, init[0])) != 0 {
		t.Errorf("without commands PID 1 %v has children", init)
	}
}

// TestEarlySignal ends the child of PID 1 though the signal came before PID 1 listened to any.
func TestEarlySignal(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("there is no sleep")
	}
	cmd := programCommand("", []string{"RUN_AS_PROGRAM=", "RUN_AS_INIT=" + sleep})
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 128+int(syscall.SIGTERM) {
		t.Error(err)
	}
}

// TestEmptyRoot runs the program and a command, itself once more, in a root that holds nothing else: no shell, no
// /dev/null, no /proc, no /etc/hosts, no /tmp. It does so as root and as somebody who may write nothing.
func TestEmptyRoot(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can change its root")
	}
	dir := t.TempDir()
	writeFile(t, dir, "program", string(readFiles(t, os.Args[0])[0]))
	writeFile(t, dir, "m.prom", "inside 1\n")
	exporter := httptest.NewServer(answer("outside 1\n"))
	defer exporter.Close()
	secure := httptest.NewTLSServer(exporter.Config.Handler)
	secure.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	defer secure.Close()
	for _, id := range []uint32{0, 65534} {
		cmd := programCommand("", nil, "--once", "--exec", "x=/program --once --file y=/m.prom",
			"--exec", "gone=/gone", "--http", "tls="+secure.URL,
			"--http", "local="+strings.Replace(exporter.URL, "127.0.0.1", "localhost", 1))
		cmd.Path, cmd.Args[0], cmd.Dir = "/program", "/program", "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir, Credential: &syscall.Credential{Uid: id, Gid: id}}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if errors.Is(err, os.ErrNotExist) {
			t.Skip("the test binary is not static: CGO_ENABLED=0 makes it so")
		}
		if cmd.ProcessState.ExitCode() != 1 { // as some sources are down
			t.Errorf("%v", err)
		}
		wantContains(t, string(out),
			`inside{exporter_name="x",exported_exporter_name="y"} 1`, `outside{exporter_name="local"} 1`,
			`reverse_exporter_source_up{exporter_name="x"} 1`, `reverse_exporter_source_up{exporter_name="gone"} 0`)
		wantContains(t, stderr.String(), "give its CA: --ca-file tls:FILE", "failed to start /gone: no such file")
		if regexp.MustCompile("process_(resident_memory_bytes|open_fds)").Match(out) {
			t.Error("there are metrics of a /proc that is not there")
		}
	}
}

// TestEnd ends at once, with status 0, if SIGTERM came while it read the files that flags name.
func TestEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	args := []string{"", backup, "--web.basic-auth-file", "/nowhere"}
	if code := run(ctx, nil, args, nil, io.Discard, io.Discard); code != 0 {
		t.Errorf("ended with %d", code)
	}
}

// TestLogWriter drops and counts what cannot be written, and holds nothing up.
func TestLogWriter(t *testing.T) {
	log := make(stuck)
	l := newLogWriter(log)
	for range 1000 {
		l.Write([]byte("line\n"))
	}
	if n := l.dropped.Load(); n < 1000-256-1 || n > 1000-256 {
		t.Errorf("%d of 1,000 lines were dropped", n)
	}
	within(time.Millisecond, l.flush) // it ends
	close(log)
	l.flush()
}

// stuck is a log that nobody reads until it is closed.
type stuck chan struct{}

func (s stuck) Write(b []byte) (int, error) { <-s; return len(b), nil }

// TestStuckLog answers whole though what could not be merged cannot be logged. That holds
// up neither the turn to render nor a page.
func TestStuckLog(t *testing.T) {
	dir := t.TempDir()
	a := writeFile(t, dir, "a.prom", "# TYPE v gauge\nv 1\n")
	b := writeFile(t, dir, "b.prom", "# TYPE v counter\nv 1\n")
	c, faults := parseFlags([]string{"--file", "a=" + a, "--file", "b=" + b, "--log.level", "warn"})
	if len(faults) > 0 {
		t.Fatal(faults)
	}
	synctest.Test(t, func(t *testing.T) {
		log := make(stuck)
		p := newProgram(t.Context(), c, log)
		done := false
		first := httptest.NewRecorder()
		go func() {
			p.ServeHTTP(first, httptest.NewRequest("GET", "/metrics", nil))
			done = true
		}()
		synctest.Wait()
		// This log has no writer of its own, so the scrape waits for it, but holds nothing meanwhile.
		wantIdle(t, p, "while the log is stuck")
		if done {
			t.Error("the first scrape has logged")
		}
		for _, w := range []*httptest.ResponseRecorder{first, get(t, p, "/metrics")} {
			wantContains(t, w.Body.String(), "# TYPE v untyped",
				`reverse_exporter_source_conflicting_families{exporter_name="a"} 1`)
		}
		close(log)
		synctest.Wait()
		if !done {
			t.Error("the first scrape does not end")
		}
	})
}

// TestTell logs a thousand subjects once, and sums up the others.
func TestTell(t *testing.T) {
	p, log := newTestProgram(t, "--file", "x=y")
	for i := range 5000 {
		p.logOnce(slog.LevelWarn, 1000, strconv.Itoa(i/2), "warned")
	}
	if n := strings.Count(log.String(), "warned"); n != 1004 || len(p.logged) != 1001 {
		t.Errorf("%d lines, %d kept, want 1004 and 1001", n, len(p.logged))
	}
}

// ---- main.go: Listening

// TestSlowClients cuts off those who send or read too slowly, and no others.
func TestSlowClients(t *testing.T) {
	body := bytes.Repeat([]byte("a_long_enough_name{x=\"y\"} 1\n"), 1<<17)
	big := writeFile(t, t.TempDir(), "big.prom", string(body))
	synctest.Test(t, func(t *testing.T) {
		p, _ := newTestProgram(t, "--file", "x="+big)
		l := servePipes(t, p)
		begin := time.Now()
		spent := func(what string, want time.Duration) {
			t.Helper()
			if d := time.Since(begin).Round(time.Second); d != want {
				t.Errorf("%s: cut off after %v, want %v", what, d, want)
			}
			begin = time.Now()
		}
		const request = "GET /metrics HTTP/1.1\r\nHost: x\r\n"
		dial := func(text string) net.Conn {
			conn := l.dial()
			io.WriteString(conn, text)
			return conn
		}
		io.ReadAll(dial(request + "X: "))
		spent("half a header", 10*time.Second)
		io.ReadAll(dial(""))
		spent("no request", 10*time.Second)

		conn := dial(request + "\r\n")
		time.Sleep(15 * time.Second)
		if n, _ := io.Copy(io.Discard, conn); n > 256<<10 {
			t.Errorf("who reads nothing for 10 s gets %d bytes", n)
		}
		synctest.Wait()
		wantIdle(t, p, "after a reader was cut off")

		dial(request + "\r\n")
		synctest.Wait()
		p.pages.alive[0].cut()
		synctest.Wait()
		wantIdle(t, p, "after a stuck reader was cut off")

		conn = dial(request + "\r\n") // too slow: 200 KiB in 10 s
		n := int64(0)
		for err := error(nil); err == nil; {
			var m int64
			m, err = io.CopyN(io.Discard, conn, 200<<10)
			n += m
			time.Sleep(10 * time.Second)
		}
		if n > 1<<20 {
			t.Errorf("who reads 200 KiB in 10 s gets %d bytes", n)
		}

		conn = dial(request + "Connection: close\r\n\r\n") // just fast enough: 256 KiB in 9 s
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = io.CopyN(io.Discard, resp.Body, 256<<10)
			time.Sleep(9 * time.Second)
		}
		if err != io.EOF {
			t.Errorf("who reads 256 KiB in 9 s is cut off: %v", err)
		}
		begin = time.Now()

		conn = dial("GET /-/healthy HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
		resp, err = http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 200 || !resp.Close {
			t.Errorf("with a body that never comes: %v, %v", resp, err)
		}
		io.ReadAll(conn)
		spent("a body that never comes", 10*time.Second)
	})
}

// TestConnections closes a connection to make room for another, of the client that has most: see
// evict. In a scene each word is a connection, followed by what happens to it: + it is new, !
// its request is being served, . it has been answered, - it is closed, ~ all are to end; half a second passes.
func TestConnections(t *testing.T) {
	addrs := map[byte]string{'a': "10.0.0.1:1", 'b': "10.0.0.2:1", 'c': "10.0.0.3:1", 'd': "@",
		'1': "[2001:db8::1]:1", '2': "[2001:db8::2]:1", '3': "[2001:db8::3]:1"} // 1 to 3 are one network
	states := map[byte]http.ConnState{
		'+': http.StateNew, '!': http.StateActive, '.': http.StateIdle, '-': http.StateClosed,
	}
	for scene, want := range map[string]string{
		"a1+ a1! a2+ a3+ a3! a4+":             "a2",    // the idle one
		"a1+ a1! a2+ a2! a3+ a3! a4+":         "a1",    // served for longest
		"a1+ a1! a2+ a2! a3+ a3! a1. a4+":     "a1",    // it has its answer
		"a1+ a1! a2+ a2! a3+ a3! a2. a1. a4+": "a2",    // it has been idle for longer
		"a1+ b1+ b2+ c1+":                     "b1",    // of the client that has most
		"a1+ 1+ 1! 2+ 2! 3+":                  "1",     // a network counts as one
		"a1+ b1+ c1+ d1+":                     "a1",    // all have one
		"a1+ a1! b1+ b1! c1+ d1+":             "a1",    // served for longer than c1 is here
		"a1+ a1! b1+ b1! c1+ c1! d1+":         "a1",    // all are served, but the new one
		"a1+ b1+ b1- b1+ c1+ a1! d1+":         "b1",    // no request for a second
		"a1+ b1+ a1! c1+ c1- c2+ b1! c3+":     "c2",    // nobody has been served for a second
		"a1+ a2+ a3+ a4+ a1. a1! a5+":         "a1 a2", // what was closed does not come back
		"a1+ a2+ a2- a3+ a4+ a4- b1+ b2+":     "a1",    // what has gone needs no room
		"a1+ a1! b1+ c1+ c1! b1~ a1. c1-":     "b1 a1", // an answer comes to its end before
	} {
		synctest.Test(t, func(t *testing.T) {
			cs := connections{all: map[net.Conn]*connection{}, room: 3}
			conns, closed := map[string]net.Conn{}, ""
			for _, word := range strings.Fields(scene) {
				name, event := word[:len(word)-1], word[len(word)-1]
				if event == '+' {
					conns[name] = &namedConn{name: name + " ", addr: addrs[name[0]], closed: &closed}
				}
				if event == '~' {
					cs.end()
				} else {
					cs.changed(conns[name], states[event])
				}
				time.Sleep(time.Second / 2)
			}
			if strings.TrimSpace(closed) != want || len(cs.all) > 3 {
				t.Errorf("%s: closed %s, want %s, %d connections", scene, closed, want, len(cs.all))
			}
		})
	}
}

// namedConn is a connection that notes its name when it is closed.
type namedConn struct {
	net.Conn
	name, addr string
	closed     *string
}

func (c *namedConn) RemoteAddr() net.Addr { return &net.UnixAddr{Name: c.addr} }

func (c *namedConn) Close() error { *c.closed += c.name; return nil }

func TestClientOf(t *testing.T) {
	for addr, want := range map[string]string{
		"10.0.0.1:80": "10.0.0.1", "[::ffff:10.0.0.1]:80": "10.0.0.1", "[2001:db8:1:2:3::4]:80": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:80": "fe80::/64", "@": "", "": "",
	} {
		if got := clientOf(addr); got != want {
			t.Errorf("%s: %q, want %q", addr, got, want)
		}
	}
}

// TestCrowd opens 10,000 connections, half of them with a byte sent, and scrapes.
func TestCrowd(t *testing.T) {
	var files syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); files.Cur < 11_000 {
		t.Skipf("a process may open %d files only", files.Cur)
	}
	s := start(t, programCommand("", nil, backup))
	for i := range 10_000 {
		conn := must(net.Dial("tcp", s.addr))
		defer conn.Close()
		if i%2 == 0 {
			io.WriteString(conn, "G")
		}
	}
	wantContains(t, httpGet(t, s.url+"/metrics"), `backup_size_bytes{exporter_name="backup"`)
	if open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.Process.Pid)); err == nil && len(open) > 1100 {
		t.Errorf("%d files are open, for 1,024 connections at most", len(open))
	}
}

// pipes is a listener for connections within the process, which know no other time than that of the test.
type pipes struct {
	conns  chan net.Conn
	closed context.Context
	close  context.CancelFunc
}

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed.Done():
		return nil, net.ErrClosed
	}
}

func (l *pipes) Close() error {
	l.close()
	return nil
}

func (l *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// dial connects to the listener.
func (l *pipes) dial() net.Conn {
	client, server := net.Pipe()
	l.conns <- server
	return client
}

// servePipes serves a program in a bubble of synctest.
func servePipes(t *testing.T, p *program) *pipes {
	l := &pipes{conns: make(chan net.Conn)}
	l.closed, l.close = context.WithCancel(context.Background())
	server := p.newServer()
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return l
}

// ---- main.go: Who may ask

// withAuth returns a password file of users with the cheapest hashes.
func withAuth(t testing.TB, dir string, passwords ...string) string {
	t.Helper()
	text := "# who may ask\n\n"
	for i := 0; i < len(passwords); i += 2 {
		text += passwords[i] + ":" + string(appendHash(nil, passwords[i+1], minIterations)) + "\n"
	}
	return replaceFile(t, dir, "auth", text)
}

// TestPasswordFlood lets wrong passwords wait in a short line, and a known one pass.
func TestPasswordFlood(t *testing.T) {
	dir := t.TempDir()
	auth := withAuth(t, dir, "known", "right", "other", "right")
	p, _ := newTestProgram(t, backup, "--web.basic-auth-file", auth)
	f := func(user, password string, want int, when string) {
		t.Helper()
		login := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
		if w := get(t, p, "/metrics", "Authorization", "Basic "+login); w.Code != want {
			t.Errorf("%s:%s %s: %d, want %d", user, password, when, w.Code, want)
		}
	}
	f("known", "right", 200, "before the flood")
	stretching := &p.passwords.turn
	stretching.wait(t.Context(), "") // somebody's password is being stretched
	var waiting sync.WaitGroup
	const most = 16
	for range most {
		waiting.Go(func() { f("nobody", "wrong", 401, "after its turn came") })
	}
	if !eventually(func() bool { return stretching.length() == most }) {
		t.Fatal("not all wait for their turn: an unknown user is to cost as much as a known one")
	}
	f("nobody", "wrong", 503, "in a flood")
	f("known", "wrong", 503, "in a flood")
	f("other", "right", 503, "in a flood")
	f("known", "right", 200, "in a flood")
	stretching.pass()
	waiting.Wait()
	f("other", "right", 200, "after the flood")
	text, _ := os.ReadFile(auth)
	replaceFile(t, dir, "auth", string(text)+"third:"+string(appendHash(nil, "x", minIterations))+"\n")
	p.watched[0].refresh(false)
	stretching.wait(t.Context(), "")
	f("known", "right", 200, "after another user came")
}

// TestSlowPassword answers in full though the password, or the source, took longer than an answer
// may take to be written, and takes a password unstretched if another request has given it meanwhile.
func TestSlowPassword(t *testing.T) {
	auth := withAuth(t, t.TempDir(), "user", "right")
	synctest.Test(t, func(t *testing.T) {
		p, _ := newTestProgram(t, "--exec", "x=true", "--timeout", "1h", "--require", "x",
			"--web.basic-auth-file", auth)
		p.sources[0].do = func(context.Context, *result, []string) *failure {
			time.Sleep(time.Minute)
			return fail("exit", "as told")
		}
		p.passwords.turn.wait(t.Context(), "another")
		conn := servePipes(t, p).dial()
		defer conn.Close()
		request := httptest.NewRequest("GET", "http://localhost/", nil)
		request.SetBasicAuth("user", "right")
		request.Write(conn)
		time.Sleep(time.Minute)
		u := (*p.passwords.users.Load())["user"]
		p.passwords.right.Store(p.passwords.digest(string(u.key)+"right"), true)
		u.salt = nil
		p.passwords.turn.pass()
		resp, err := http.ReadResponse(bufio.NewReader(conn), request)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%v, %v", resp, err)
		}
		io.Copy(io.Discard, resp.Body)
		request.URL.Path = "/metrics"
		request.Write(conn)
		resp, err = http.ReadResponse(bufio.NewReader(conn), request)
		if err != nil || resp.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("of a source that is slow: %v, %v", resp, err)
		}
	})
}

// TestImpatientClient finds the password checked that it gave before it left. One check of it goes on.
func TestImpatientClient(t *testing.T) {
	auth := withAuth(t, t.TempDir(), "user", "right")
	synctest.Test(t, func(t *testing.T) {
		p, _ := newTestProgram(t, backup, "--web.basic-auth-file", auth)
		ps := &p.passwords
		ps.turn.wait(t.Context(), "another")
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if code := ps.check(ctx, "client", "user", "right"); code != http.StatusServiceUnavailable {
				t.Errorf("before its turn: %d", code)
			}
		}
		if synctest.Wait(); ps.turn.length() != 1 {
			t.Errorf("%d checks go on, want 1", ps.turn.length())
		}
		ps.turn.pass()
		synctest.Wait()
		ps.turn.wait(t.Context(), "another")
		if code := ps.check(t.Context(), "client", "user", "right"); code != http.StatusOK {
			t.Errorf("the next try: %d", code)
		}
	})
}

// TestWhoMayAsk ends open connections when the CA of the clients or the users change.
func TestWhoMayAsk(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := newAuthority(t, dir, "ca").issue(t, dir, "server")
	p, _ := newTestProgram(t, backup, "--web.tls-cert-file", certFile, "--web.tls-key-file", keyFile,
		"--web.tls-client-ca-file", dir+"/ca.pem", "--web.basic-auth-file", withAuth(t, dir, "user", "right"))
	for i, want := range []string{"", "conn", "conn"} {
		closed, name := "", filepath.Base(p.watched[i].files[0].name)
		p.connections.changed(&namedConn{name: "conn", addr: "@", closed: &closed}, http.StateNew)
		replaceFile(t, dir, name, string(readFiles(t, dir+"/"+name)[0])+"\n")
		if p.watched[i].refresh(false); closed != want {
			t.Errorf("after a change of %s: closed %q, want %q", name, closed, want)
		}
	}
}

// ---- main.go: A scrape

// TestGone gives a client that has left no page, and does not refuse it.
func TestGone(t *testing.T) {
	p, _ := newTestProgram(t, backup, "--web.basic-auth-file", withAuth(t, t.TempDir(), "user", "right"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 {
		if _, err := p.openPage(ctx, &pageRequest{}, time.Minute); err != context.Canceled {
			t.Fatalf("opened a page: %v", err)
		}
	}
	defer func() {
		if recover() != http.ErrAbortHandler || p.refusals.Load() > 0 {
			t.Error("a client that has left is refused")
		}
	}()
	p.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil).WithContext(ctx))
}

// TestTimeLimit reads what a scraper says of its deadline. Without one, two runs fit before it.
func TestTimeLimit(t *testing.T) {
	p, _ := newTestProgram(t, "--file", "x=y", "--timeout", "3s")
	for header, want := range map[string]time.Duration{
		"": 7 * time.Second, "x": 7 * time.Second, "NaN": 7 * time.Second, "-1": 7 * time.Second, "0": 7 * time.Second,
		"+Inf": 7 * time.Second, "1e400": 7 * time.Second,
		"1": time.Second, "10": 10 * time.Second, "1e12": 1e6 * time.Second,
	} {
		if timeout := p.scrapeTimeout(p.sources, header); timeout != want {
			t.Errorf("%q: %v, want %v", header, timeout, want)
		}
	}
}

// eachAccept calls do for the Accept headers in testdata/accept.txt.
func eachAccept(t testing.TB, do func(name, header string, want accept)) {
	eachLine(readFiles(t, "testdata/accept.txt")[0], func(line string) error {
		columns := strings.Split(line, "|")
		column := func(i int) string { return strings.TrimSpace(columns[i]) }
		do(column(0), column(3), accept{format{column(2) == "OpenMetrics", column(2) == "protobuf"}, column(1)})
		return nil
	})
}

// TestAccepts reads what scrapers take, and asks exporters for the same.
func TestAccepts(t *testing.T) {
	eachAccept(t, func(name, header string, want accept) {
		got := accepted([]string{header})
		if asked := accepted([]string{got.header()}); got != want || asked != want {
			t.Errorf("%s: %+v, asked for as %+v", name, got, asked)
		}
	})
}

// FuzzAccept reads what scrapers accept: neither the case of letters nor how it is
// spread over header lines changes what it means.
func FuzzAccept(f *testing.F) {
	eachAccept(f, func(_, header string, _ accept) { f.Add(header, "gzip") })
	for _, encoding := range []string{"gzip;q=0.5, identity;q=1", "*;q=0, gzip", "GZip; Q=0.000, *", "x-gzip;q=NaN"} {
		f.Add("", encoding)
	}
	f.Fuzz(func(t *testing.T, header, encoding string) {
		escapes := func(headers []string) bool { return accepted(headers).escaping != "" }
		better := func(headers []string) bool { return accepted(headers).format != format{} }
		for _, c := range []struct {
			header       string
			accepts      func([]string) bool
			needs        []string // one of them is in what accepts
			sure, refuse string
		}{
			{header, escapes, escapings, "text/plain;escaping=dots", ""},
			{header, better, []string{"application/openmetrics-text", "protobuf"}, "application/openmetrics-text", ""},
			{encoding, acceptsGzip, []string{"gzip", "*"}, "gzip;q=1", "gzip;q=0"},
		} {
			if strings.ContainsFunc(c.header, func(c rune) bool { return c >= utf8.RuneSelf }) {
				c.accepts([]string{c.header})
				continue // there are letters whose lower case is ASCII
			}
			got := c.accepts([]string{c.header})
			if c.accepts(strings.Split(c.header, ",")) != got || c.accepts([]string{strings.ToUpper(c.header)}) != got {
				t.Errorf("%q: %v, otherwise in pieces or upper case", c.header, got)
			}
			in := func(part string) bool {
				return strings.Contains(withoutBlanks.Replace(strings.ToLower(c.header)), part)
			}
			if got && !slices.ContainsFunc(c.needs, in) {
				t.Errorf("%q accepts without %q", c.header, c.needs)
			}
			if !c.accepts([]string{c.header, c.sure}) || c.refuse != "" && c.accepts([]string{c.header, c.refuse}) {
				t.Errorf("%q does not accept with %q, or accepts with %q", c.header, c.sure, c.refuse)
			}
		}
	})
}

// TestProcessNow reads what the system tells of the process once a second at most.
func TestProcessNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := newTestProgram(t, backup)
		first := p.processNow()
		time.Sleep(time.Second - 1)
		if p.processNow() != first {
			t.Error("read twice within a second")
		}
		time.Sleep(1)
		if p.processNow() == first {
			t.Error("the same after a second")
		}
		wantContains(t, pageText(pageOf(textForm, first)), "process_open_fds{", "process_resident_memory_bytes{",
			"go_memstats_heap_alloc_bytes{", "process_cpu_seconds_total{")
	})
}

// ---- main.go: The overview page

// TestOverviewRecovery shows the error of a source that is up again for an hour, later to who asks.
func TestOverviewRecovery(t *testing.T) {
	for _, c := range []struct {
		state int
		ago   time.Duration
		shown bool
	}{{isUp, 59 * time.Minute, true}, {isUp, 61 * time.Minute, false}, {isDown, 61 * time.Minute, true}} {
		r := row{source: &source{waterfall: waterfall{sourceConfig: &sourceConfig{paths: []string{"/m"}}}}}
		r.state = c.state
		r.status = status{lastFailure: fail("file", "x"), lastFailureTime: time.Now().Add(-c.ago)}
		got := string(r.appendDetails(nil, "curl"))
		if strings.Contains(got, " well") == c.shown || !strings.Contains(got, "<b>file:</b>") {
			t.Errorf("%v ago, now %v: %s", c.ago, c.state, got)
		}
	}
}

// TestOverviewAdvice has something to say to each reason that a fetch can fail for. Busy is
// none: it is a scrape that found no place.
func TestOverviewAdvice(t *testing.T) {
	for kind, all := range reasons {
		for _, reason := range all {
			if hints[reason] == "" && reason != "busy" {
				t.Errorf("nothing is said about %s of a source of kind %s", reason, kind)
			}
		}
	}
}

// TestOverviewSize keeps the page small: it is loaded again every 15 s.
func TestOverviewSize(t *testing.T) {
	for _, c := range []struct{ up, down, limit int }{{6, 5, 11_000}, {55, 5, 36_000}, {0, 20, 30_000}} {
		var args []string
		for i := range c.up {
			args = append(args, "--file", fmt.Sprintf("appliance-service-%02d=testdata/appliance/backup.prom", i))
		}
		for i := range c.down {
			url := "http://127.0.0.1:1/source-%[1]d.monitoring.example/metrics"
			args = append(args, "--http", fmt.Sprintf("source-%d="+url, i))
		}
		p, _ := newTestProgram(t, args...)
		get(t, p, "/metrics")
		page := get(t, p, "/").Body.String()
		wantContains(t, page, fmt.Sprintf("✖ %d down", c.down), fmt.Sprintf("%d of %d up", c.up, c.up+c.down))
		if len(page) > c.limit {
			t.Errorf("%d bytes for %d sources, want %d at most", len(page), c.up+c.down, c.limit)
		}
	}
}

// TestOverviewUnmerged lists what could not be merged as it came, and no more than fits.
func TestOverviewUnmerged(t *testing.T) {
	p, _ := newTestProgram(t, "--file", "a=x")
	if page := string(p.appendIndex(nil)); strings.Contains(page, "-unmerged") {
		t.Errorf("without any: %s", page)
	}
	found := &findings{pairs: map[pair]*concern{}}
	found.add(pair{typesDiffer, "c1", "c2"}, "<b>"+strings.Repeat("x", 1000))
	for i := range 1020 {
		found.add(pair{sameSeries, "d", fmt.Sprint("more", i)}, "m")
	}
	p.found.Store("/metrics", found)
	page := string(p.appendIndex(nil))
	wantContains(t, page, "<a href=#-unmerged>conflicts: 1000</a>",
		"<h2 id=-unmerged>Could not be merged as it came (20 of 1000)</h2>",
		"<li>c1, c2: &lt;b&gt;"+strings.Repeat("x", 77)+
			": the types of metric families differ: they are served untyped")
	if n := strings.Count(page, "<li>d, more"); n != 19 {
		t.Errorf("%d of the same series, want 19", n)
	}
}

// TestOverviewUnits writes numbers as the page has them.
func TestOverviewUnits(t *testing.T) {
	f := func(got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	for d, want := range map[string]string{
		"0s": "0.1 ms", "49us": "0.1 ms", "540us": "0.5 ms", "2ms": "2 ms", "9940us": "9.9 ms", "9960us": "10 ms",
		"812ms": "812 ms", "999ms": "999 ms", "999600us": "1 s", "8.9s": "8.9 s", "10s": "10 s", "2m": "120 s",
	} {
		took, _ := time.ParseDuration(d)
		f(durationText(took), want)
	}
	f(grouped(0)+" "+grouped(999)+" "+grouped(1000)+" "+grouped(1002003), "0 999 1\u202f000 1\u202f002\u202f003")
	f(ago(time.Time{}), "never")
	synctest.Test(t, func(t *testing.T) { // time stands still at midnight
		at := func(d time.Duration) string { return ago(time.Now().Add(-d)) }
		f(at(0)+"; "+at(119*time.Second), "00:00:00, 0 s ago; 23:58:01, 119 s ago")
		f(at(2*time.Minute)+"; "+at(119*time.Minute), "23:58:00, 2 min ago; 22:01:00, 119 min ago")
		f(at(2*time.Hour)+"; "+at(47*time.Hour), "22:00:00, 2 h ago; 30 Dec 01:00:00, 47 h ago")
		f(at(48*time.Hour), "30 Dec 00:00:00, 2 d ago")
	})
}

// TestOverviewStale is amber once nobody has scraped for three times the longest of the last five gaps,
// a minute at least. What a person asks of a single source is no scrape.
func TestOverviewStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := newTestProgram(t, "--file", "a=testdata/appliance/backup.prom", "--exec", "b=true")
		heading := func(pause time.Duration, want string) {
			t.Helper()
			time.Sleep(pause)
			page := get(t, p, "/").Body.String()
			_, page, _ = strings.Cut(page, "<header class=")
			got, _, _ := strings.Cut(page, " – ")
			if got != want {
				t.Errorf("after %v: %s, want %s", pause, got, want)
			}
		}
		p.sources[1].do = func(context.Context, *result, []string) *failure { return nil }
		heading(time.Hour, "wait><h1>○ nothing asked yet")
		get(t, p, "/metrics")
		heading(59*time.Second, "up><h1>● all up")
		heading(time.Second, "wait><h1>▲ not scraped for 60 s: the state of 01:00")
		get(t, p, "/metrics?exporter_name=a")
		heading(time.Second, "wait><h1>▲ not scraped for 61 s: the state of 01:00")
		get(t, p, "/metrics?exporter_name=a", timeoutHeader, "5")
		heading(3*time.Minute, "up><h1>● all up")
		heading(3*time.Second, "wait><h1>▲ not scraped for 3 min: the state of 01:01")
		for range 6 {
			get(t, p, "/metrics")
			time.Sleep(15 * time.Second)
		}
		p.sources[1].do = func(context.Context, *result, []string) *failure { return fail("exit", "x") }
		get(t, p, "/metrics")
		heading(59*time.Second, "down><h1>✖ 1 down")
		heading(time.Second, "wait><h1>▲ not scraped for 60 s: the state of 01:05, 1 down")
	})
}

// TestOverviewKept makes the page once a second, whoever looks at it, and says to each where they look.
func TestOverviewKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := newTestProgram(t, "--file", "a=testdata/appliance/backup.prom",
			"--drop", "go_*", "--drop", "backup_size*", "--drop", "b*")
		at := func(path string) string { return get(t, p, path).Body.String() }
		first := at("/")
		get(t, p, "/metrics")
		if page := at("/"); page != first {
			t.Errorf("made anew: %s", page)
		}
		time.Sleep(time.Second)
		wantContains(t, at("/"), "all up", "has matched --drop go_*\n", `<meta http-equiv=refresh content="15;url=./">`)
		if page := at("/?refresh=0"); strings.Contains(page, "http-equiv") || strings.Contains(page, "\x00") {
			t.Errorf("it is renewed: %s", page)
		}
		r := httptest.NewRequest("GET", "/", nil)
		r.Host, r.TLS = "a'<b>", &tls.ConnectionState{}
		w := httptest.NewRecorder()
		p.ServeHTTP(w, r)
		wantContains(t, w.Body.String(), "<code>curl -s 'https://a&lt;b&gt;/metrics?exporter_name=a'</code>")
		p.basicAuth = "x"
		wantContains(t, string(p.appendIndex(nil)), "<code>curl -s -u USER '")
	})
}

// ---- main.go: Small modes

// ---- The built program

// built builds the program with the command of README, and returns its path.
var built = sync.OnceValue(func() string {
	_, command, _ := strings.Cut(string(must(os.ReadFile("README.md"))), "```sh\nCGO_ENABLED=0 ")
	command, _, _ = strings.Cut(command, "\n")
	path := filepath.Join(must(os.MkdirTemp("", "reverse_exporter")), "reverse_exporter")
	cmd := exec.Command("sh", "-c", command+" -o "+path+" .")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		panic(fmt.Errorf("%s: %w: %s", command, err, out))
	}
	return path
})

// usage returns the milliseconds that a process has computed, and its memory in MiB by the
// names of /proc. It skips where there is no /proc.
func usage(b *testing.B, pid int) (cpu float64, memory map[string]float64) {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Skip("there is no /proc")
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')'):]))
	for _, hundredths := range fields[12:14] { // in user mode and in the kernel
		n, _ := strconv.ParseFloat(hundredths, 64)
		cpu += 10 * n
	}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	memory = map[string]float64{}
	for line := range strings.Lines(string(status)) {
		name, kib, _ := strings.Cut(line, ":")
		n, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(kib), " kB"), 64)
		memory[name] = n / 1024
	}
	return cpu, memory
}

// load scrapes a process b.N times, by so many clients at once, and reports its CPU time for
// one scrape and its peak memory.
func load(b *testing.B, s *started, clients int) {
	b.Helper()
	client := &http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: clients}}
	scrape := func() int64 {
		resp, err := client.Get(s.url + "/metrics")
		if err != nil {
			b.Error(err)
			return 0
		}
		defer resp.Body.Close()
		n, err := io.Copy(io.Discard, resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			b.Errorf("%s after %d bytes: %v", resp.Status, n, err)
		}
		return n
	}
	b.SetBytes(scrape())
	before, _ := usage(b, s.Process.Pid)
	b.ResetTimer()
	var workers sync.WaitGroup
	var begun atomic.Int64
	for range clients {
		workers.Go(func() {
			for begun.Add(1) <= int64(b.N) {
				scrape()
			}
		})
	}
	workers.Wait()
	b.StopTimer()
	after, memory := usage(b, s.Process.Pid)
	b.ReportMetric((after-before)/float64(b.N), "cpu-ms/op")
	b.ReportMetric(memory["VmHWM"], "peak-MiB")
}

// exporters serves bodies in turn, at paths that are numbers.
func exporters(b *testing.B, bodies ...[]byte) string {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i, _ := strconv.Atoi(r.URL.Path[1:])
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(bodies[i%len(bodies)]))
	}))
	b.Cleanup(server.Close)
	return server.URL
}

// BenchmarkProgram scrapes the built program with so many exporters behind it, as README tells.
func BenchmarkProgram(b *testing.B) {
	for _, c := range []struct {
		sources  int
		size     string
		families int // 0 if the exporters are real
		clients  int
	}{
		{8, "real", 0, 1}, {40, "real", 0, 1}, {100, "1MB", 100, 1}, {2, "10MB", 1000, 1000},
	} {
		b.Run(fmt.Sprintf("%dx%s/c=%d", c.sources, c.size, c.clients), func(b *testing.B) {
			bodies := readFiles(b, glob(b, "testdata/scrapes/*.prom")...)
			if c.families > 0 {
				bodies = [][]byte{generate(c.families, 100)}
			}
			url := exporters(b, bodies...)
			args := []string{"--max-bytes", "512MiB", "--timeout", "1m", "--log.level", "info"}
			for i := range c.sources {
				args = append(args, "--http", fmt.Sprintf("source%d=%s/%[1]d", i, url))
			}
			load(b, start(b, exec.Command(built(), args...)), c.clients)
		})
	}
}

// BenchmarkStart is the time from the start of the built program to its first answer. It
// reports the memory before that, also without what the binary has, and the binary's size.
func BenchmarkStart(b *testing.B) {
	path := built() // before the first start is timed
	for b.Loop() {
		s := start(b, exec.Command(path, "--file", "node=testdata/scrapes/node_exporter.prom"))
		_, memory := usage(b, s.Process.Pid)
		b.ReportMetric(memory["VmRSS"], "idle-MiB")
		b.ReportMetric(memory["RssAnon"], "own-MiB")
		httpGet(b, s.url+"/metrics")
		s.Process.Kill()
	}
	if info, err := os.Stat(path); err == nil {
		b.ReportMetric(float64(info.Size()), "binary-B")
	}
}
