package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"
)

var update = flag.Bool("update", false, "rewrite the want files of testdata/cases")

// TestMain runs the test binary as the program itself where a test asks for it,
// so that such tests are end to end.
func TestMain(m *testing.M) {
	if os.Getenv("RUN_AS_PROGRAM") != "" {
		main()
	}
	os.Exit(m.Run())
}

// program returns a command that runs the program in a process of its own.
func programCommand(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "RUN_AS_PROGRAM=1")
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

// newTestProgram makes the program that flags stand for, in this process.
func newTestProgram(t testing.TB, args ...string) (*program, *syncBuffer) {
	t.Helper()
	c, faults := parseFlags(args)
	if len(faults) > 0 {
		t.Fatalf("flags %q: %q", args, faults)
	}
	life, end := context.WithCancel(context.Background())
	log := &syncBuffer{}
	p := newProgram(life, c, log)
	t.Cleanup(func() {
		end()
		for _, s := range c.sources {
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

// writeFile writes a file of a test and returns its path.
func writeFile(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
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

// Parse and merge.

// TestCases merges the *.prom files of each folder of testdata/cases, each one a
// source of its file's name, with the flags in the file flags, if there is one.
// The page, without status metrics, and the failures are to be as in want.
func TestCases(t *testing.T) {
	dirs, _ := filepath.Glob("testdata/cases/*")
	if len(dirs) == 0 {
		t.Fatal("there are no cases")
	}
	for _, dir := range dirs {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			var args []string
			files, _ := filepath.Glob(dir + "/*.prom")
			for _, file := range files {
				args = append(args, "--file", strings.TrimSuffix(filepath.Base(file), ".prom")+"="+file)
			}
			extra, _ := os.ReadFile(dir + "/flags")
			p, _ := newTestProgram(t, append(args, strings.Fields(string(extra))...)...)
			got := mergeCase(p, dir)
			if *update {
				writeFile(t, dir, "want", got)
			}
			want, err := os.ReadFile(dir + "/want")
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

// mergeCase returns the page of all sources, and a line for each failure.
func mergeCase(p *program, dir string) string {
	var bodies []*exposition
	var failures strings.Builder
	for _, s := range p.sources {
		r := s.fetch(context.Background(), nil)
		bodies = append(bodies, r.bodies...)
		if r.failure != nil {
			fmt.Fprintf(&failures, "FAILED %s: %s: %v\n", s.name, r.failure.reason, strings.ReplaceAll(r.failure.err.Error(), dir+"/", ""))
		}
	}
	return pageText(merge(bodies)) + failures.String()
}

func pageText(pg *page) string { return string(bytes.Join(pg.chunks, nil)) }

// parseAll returns what a parser finds in a body, a line for each line found.
func parseAll(src io.Reader) (string, error) {
	p := parser{src: src}
	var b strings.Builder
	for p.next() {
		switch p.kind {
		case sampleLine:
			fmt.Fprintf(&b, "%s", p.name)
			for _, l := range p.labels {
				fmt.Fprintf(&b, " %s=%s", p.labelName(l), p.labelText(l))
			}
			fmt.Fprintf(&b, " | %s %s\n", p.value, p.stamp)
		case helpLine:
			fmt.Fprintf(&b, "HELP %s %s\n", p.name, p.text)
		case typeLine:
			fmt.Fprintf(&b, "TYPE %s %s\n", p.name, typeNames[p.metricType])
		}
	}
	return b.String(), p.err
}

// TestParserWindow reads bodies in pieces that end anywhere, also inside of
// lines that are longer than the window.
func TestParserWindow(t *testing.T) {
	long := strings.Repeat("x", windowSize) + "\n" + strings.Repeat("y\n", windowSize)
	bodies := map[string]string{
		"long value":     `a{b="` + long + `"} 1` + "\n" + `a{b="` + long + `"} 2` + "\nb 3",
		"long comment":   "# " + strings.Repeat("c", 3*windowSize) + "\na 1\n",
		"line at border": strings.Repeat("a 1\n", windowSize/4-1) + "abc 2\nd 3\n",
	}
	for _, name := range []string{"node_exporter", "prometheus", "netdata_all_hosts"} {
		text, err := os.ReadFile("testdata/scrapes/" + name + ".prom")
		if err != nil {
			t.Fatal(err)
		}
		bodies[name] = string(text)
	}
	for name, text := range bodies {
		whole, err := parseAll(strings.NewReader(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if n := strings.Count(whole, "|"); n == 0 {
			t.Errorf("%s: no samples", name)
		}
		pieces, err := parseAll(iotest.OneByteReader(strings.NewReader(text)))
		if err != nil || pieces != whole {
			t.Errorf("%s: other lines when read byte by byte (%v)", name, err)
		}
		halves, err := parseAll(iotest.DataErrReader(iotest.HalfReader(strings.NewReader(text))))
		if err != nil || halves != whole {
			t.Errorf("%s: other lines when read in halves (%v)", name, err)
		}
	}
}

// TestParserResumes scans lines that share beginnings of every length, and
// wants of each what it is alone.
func TestParserResumes(t *testing.T) {
	lines := []string{
		`m{a="1",b="2"} 1`, `m{a="1",b="2"} 2`, `m{a="1",b="22"} 1`, `m{a="1",bb="2"} 1`, `m{a="1"} 1`,
		`m{a="1",b="2",c="3"} 1`, `m{a="1",b="2",c="\""} 1`, `m{a="1",b="2",c="\"",d=""} 1`, `m 1`, `m 12`,
		`m{a="11"} 1`, `mm{a="1"} 1`, `m{a="1" ,b="2"} 1`, `m{a="1",b="2"} 1 5`, `m{a="1",b="2",} 1`, `m {a="1"} 1`,
		`m{b="2",a="1"} 1`, `m{a="longer value 1",b="2"} 1`, `m{a="longer value 2",b="2"} 1`,
	}
	for _, first := range lines {
		for _, second := range lines {
			one, err1 := parseAll(strings.NewReader(first))
			two, err2 := parseAll(strings.NewReader(second))
			both, err := parseAll(strings.NewReader(first + "\n" + second))
			if err1 != nil || err2 != nil || err != nil || both != one+two {
				t.Errorf("%s\n%s\ngot:\n%s(%v, %v, %v)", first, second, both, err1, err2, err)
			}
		}
	}
	for _, second := range []string{`m{a="1",a="1"} 1`, `m{a="1",b="2",a="3"} 1`, `m{a="1",b="2",b="2"} 1`} {
		if _, err := parseAll(strings.NewReader(lines[0] + "\n" + second)); err == nil {
			t.Errorf("%s behind %s: the repeated label is taken", second, lines[0])
		}
	}
}

// TestManyLabels finds a repeated label name among many.
func TestManyLabels(t *testing.T) {
	for _, n := range []int{2, fewLabels - 1, fewLabels, fewLabels + 1, 500} {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `l%d="",`, i)
		}
		if _, err := parseAll(strings.NewReader("m{" + b.String() + "} 1")); err != nil {
			t.Errorf("%d labels: %v", n, err)
		}
		if _, err := parseAll(strings.NewReader("m{" + b.String() + `l1=""} 1`)); err == nil {
			t.Errorf("%d labels and one of them again: taken", n)
		}
	}
}

// scrapes returns the paths of all real scrapes.
func scrapes(t testing.TB) []string {
	t.Helper()
	files, _ := filepath.Glob("testdata/scrapes/*.prom")
	if len(files) < 8 {
		t.Fatalf("only %d scrapes", len(files))
	}
	return files
}

// readSamples reads an exposition in the simplest way there is, and counts its
// samples: name, sorted labels with values as they are meant, value, timestamp.
func readSamples(t testing.TB, text string, added ...string) map[string]int {
	t.Helper()
	samples := map[string]int{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || line[0] == '#' {
			continue
		}
		end := strings.IndexAny(line, "{ ")
		name, rest := line[:end], line[end:]
		labels := slices.Clone(added)
		if rest[0] == '{' {
			rest = rest[1:]
			for rest[0] != '}' {
				key, after, _ := strings.Cut(rest, `="`)
				var value []byte
				i := 0
				for ; after[i] != '"'; i++ {
					if after[i] == '\\' {
						i++
						if after[i] == 'n' {
							value = append(value, '\n')
							continue
						}
					}
					value = append(value, after[i])
				}
				labels = append(labels, fmt.Sprintf("%s=%q", strings.TrimLeft(key, ","), value))
				rest = strings.TrimPrefix(after[i+1:], ",")
			}
			rest = rest[1:]
		}
		slices.Sort(labels)
		samples[name+"{"+strings.Join(labels, ",")+"}"+rest]++
	}
	return samples
}

// sourcesOf returns flags that make each file a source of its base name.
func sourcesOf(files []string) []string {
	var args []string
	for _, file := range files {
		args = append(args, "--file", strings.TrimSuffix(filepath.Base(file), ".prom")+"="+file)
	}
	return args
}

// TestExact merges real scrapes alone, in pairs and all together: the samples of
// the page are those of the scrapes with their labels, byte for byte, families
// are there once and in order, and a second scrape gives the same bytes.
func TestExact(t *testing.T) {
	files := scrapes(t)
	sets := [][]string{files}
	for i, a := range files {
		sets = append(sets, []string{a})
		for _, b := range files[i+1:] {
			sets = append(sets, []string{a, b}, []string{b, a})
		}
	}
	for _, set := range sets {
		p, _ := newTestProgram(t, sourcesOf(set)...)
		page := mergeCase(p, "")
		want := map[string]int{}
		for _, file := range set {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			name := strings.TrimSuffix(filepath.Base(file), ".prom")
			for s, n := range readSamples(t, string(text), fmt.Sprintf("exporter_name=%q", name)) {
				want[s] += n
			}
		}
		got := readSamples(t, page)
		for s, n := range want {
			if got[s] != n {
				t.Errorf("%v: %d of %s, want %d", set, got[s], s, n)
			}
		}
		for s := range got {
			if want[s] == 0 {
				t.Errorf("%v: invented %s", set, s)
			}
		}
		checkShape(t, page)
		if again := mergeCase(p, ""); again != page {
			t.Errorf("%v: the second scrape differs", set)
		}
	}
}

// checkShape wants HELP, TYPE and samples of each family once, together, and in
// the order of the families' names.
func checkShape(t testing.TB, page string) {
	t.Helper()
	family, helped, kind := "", "", ""
	for line := range strings.Lines(page) {
		word := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "# HELP "):
			helped = word[2]
		case strings.HasPrefix(line, "# TYPE "):
			if word[2] <= family || helped > family && helped != word[2] {
				t.Errorf("family %s behind %s (HELP of %s)", word[2], family, helped)
			}
			family, kind = word[2], word[3]
		default:
			name := line[:strings.IndexAny(line, "{ ")]
			suffix, ok := strings.CutPrefix(name, family)
			ok = ok && (suffix == "" || (kind == "histogram" || kind == "summary") && (suffix == "_sum" || suffix == "_count") || kind == "histogram" && suffix == "_bucket")
			if !ok {
				t.Errorf("sample %s in family %s, a %s", name, family, kind)
			}
		}
	}
	if !strings.HasSuffix(page, "\n") || strings.Contains(page, "\n\n") {
		t.Error("the page has an empty line, or no newline at its end")
	}
}

// TestPromtool lets Prometheus' own tool read the pages.
func TestPromtool(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed")
	}
	p, _ := newTestProgram(t, append(sourcesOf(scrapes(t)), "--exec", "certs=testdata/appliance/certs.sh")...)
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = get(t, p, "/metrics").Body
	out, err := cmd.CombinedOutput()
	if exit, ok := err.(*exec.ExitError); err != nil && (!ok || exit.ExitCode() != 3) { // 3: only lint, of the scrapes' own names
		t.Errorf("%v\n%s", err, out)
	}
	if strings.Contains(string(out), "error while linting") || strings.Contains(string(out), "reverse_exporter") {
		t.Errorf("%s", out)
	}
}

// TestLimit bounds what is read, and what is made of it.
func TestLimit(t *testing.T) {
	dir := t.TempDir()
	body := writeFile(t, dir, "body.prom", strings.Repeat("metric_name 1\n", 100)) // 1400 bytes
	many := writeFile(t, dir, "many.prom", strings.Repeat("a1 1\nb1 1\n", 140))    // 1400 bytes, 280 families
	for _, c := range []struct {
		file, size, want string
	}{
		{body, "1400B", ""},
		{body, "1399B", "too_large"},
		{many, "1400B", "too_large"}, // more than four times that to hold
		{many, "1MiB", ""},
	} {
		p, _ := newTestProgram(t, "--file", "x="+c.file, "--max-bytes", c.size)
		r := p.sources[0].fetch(context.Background(), nil)
		got := ""
		if r.failure != nil {
			got = r.failure.reason
		}
		if got != c.want || (got != "") != (len(r.bodies) == 0) {
			t.Errorf("%s with %s: %q, %d bodies, want %q", filepath.Base(c.file), c.size, got, len(r.bodies), c.want)
		}
	}
}

// Sources.

// rawServer answers each connection with bytes as they are, then closes it.
func rawServer(t *testing.T, answer string, reset bool) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			http.ReadRequest(bufio.NewReader(conn))
			io.WriteString(conn, answer)
			if reset {
				conn.(*net.TCPConn).SetLinger(0)
			}
			conn.Close()
		}
	}()
	return "http://" + l.Addr().String() + "/metrics"
}

// zipped returns text as a gzip stream.
func zipped(text string) string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	io.WriteString(z, text)
	z.Close()
	return b.String()
}

// TestHTTPFailures wants a source down, with its reason in the metrics and the
// log, and the source beside it served, whatever an exporter answers.
func TestHTTPFailures(t *testing.T) {
	elsewhere := rawServer(t, "HTTP/1.1 200 OK\r\n\r\nstolen 1\n", false)
	const ok = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n"
	const body = "a 1\nb 2\n"
	closed, _ := net.Listen("tcp", "127.0.0.1:0")
	closed.Close()
	bomb := zipped(strings.Repeat("a 1\n", 1<<20))
	for _, c := range []struct{ name, answer, reason string }{
		{"whole", ok + "Content-Length: 8\r\n\r\n" + body, ""},
		{"until close", ok + "\r\n" + body, ""},
		{"no content type", "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n" + body, ""},
		{"gzip unasked", ok + "Content-Encoding: gzip\r\n\r\n" + zipped(body), ""},
		{"empty", ok + "Content-Length: 0\r\n\r\n", ""},
		{"chunked", ok + "Transfer-Encoding: chunked\r\n\r\n8\r\n" + body + "\r\n0\r\n\r\n", ""},
		{"status", "HTTP/1.1 503 Busy\r\nContent-Length: 8\r\n\r\n" + body, "status"},
		{"html", "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", "content_type"},
		{"protobuf", "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.google.protobuf\r\n\r\n" + body, "content_type"},
		{"malformed line", ok + "\r\na 1\nb\n", "parse"},
		{"cut short", ok + "Content-Length: 9\r\n\r\n" + body, "read"},
		{"chunk missing", ok + "Transfer-Encoding: chunked\r\n\r\n8\r\n" + body + "\r\n", "read"},
		{"no answer", "", "read"},
		{"no HTTP", "SSH-2.0-secret\r\n\r\n", "read"},
		{"cut gzip", ok + "Content-Encoding: gzip\r\n\r\n" + zipped(body)[:20], "read"},
		{"no gzip", ok + "Content-Encoding: gzip\r\n\r\n" + body + body, "encoding"},
		{"damaged gzip", ok + "Content-Encoding: gzip\r\n\r\n" + zipped(body)[:24] + "12345678", "encoding"},
		{"other encoding", ok + "Content-Encoding: br\r\n\r\n" + body, "encoding"},
		{"too large", ok + "\r\n" + strings.Repeat(body, 1<<13), "too_large"},
		{"gzip bomb", ok + "Content-Encoding: gzip\r\n\r\n" + bomb, "too_large"},
		{"redirect elsewhere", "HTTP/1.1 302 Found\r\nLocation: " + elsewhere + "\r\n\r\n", "status"},
		{"endless header", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n", "read"},
		{"refused", "", "connect"},
		{"reset", ok + "Content-Length: 100000\r\n\r\n" + body, "read"},
	} {
		t.Run(c.name, func(t *testing.T) {
			target := rawServer(t, c.answer, c.name == "reset")
			if c.name == "refused" {
				target = "http://" + closed.Addr().String() + "/metrics"
			}
			p, log := newTestProgram(t, "--http", "x="+target, "--max-bytes", "64KiB", "--file", "beside=testdata/appliance/backup.prom")
			for range 2 {
				page := get(t, p, "/metrics").Body.String()
				up := "1"
				if c.reason != "" {
					up = "0"
				}
				wantContains(t, page, `reverse_exporter_source_up{exporter_name="x"} `+up, `backup_size_bytes{exporter_name="beside",target="nas"} 7.3014444032e+10`)
				if strings.Contains(page, "stolen") || c.reason != "" && strings.Contains(page, "a{") {
					t.Errorf("samples of a failed body in:\n%s", page)
				}
			}
			if c.reason == "" {
				return
			}
			page := get(t, p, "/metrics").Body.String()
			wantContains(t, page, fmt.Sprintf(`reverse_exporter_source_failures_total{exporter_name="x",reason=%q} 3`, c.reason))
			if n := strings.Count(log.String(), "source=x reason="+c.reason); n != 1 {
				t.Errorf("logged %d times, want once:\n%s", n, log)
			}
			if strings.Contains(log.String(), "secret") {
				t.Errorf("an answer is quoted in the log:\n%s", log)
			}
		})
	}
}

// TestRequest looks at what an exporter is asked.
func TestRequest(t *testing.T) {
	var got *http.Request
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r
		io.WriteString(w, "a 1\n")
	}))
	defer exporter.Close()
	p, _ := newTestProgram(t, "--http", "x="+exporter.URL+"/m?collect=a", "--params", "x:target,b", "--timeout", "4s")
	get(t, p, "/metrics?target=t%261&target=t2&other=o&exporter_name=x", "Accept", "text/html", timeoutHeader, "2", "Authorization", "Basic c2VjcmV0")
	if got == nil {
		t.Fatal("the exporter was not asked")
	}
	if want := "/m?collect=a&target=t%261&target=t2"; got.URL.String() != want {
		t.Errorf("asked for %s, want %s", got.URL, want)
	}
	for header, want := range map[string]string{
		"Accept": accept, "Accept-Encoding": "identity", timeoutHeader: "3.6", "Authorization": "", "User-Agent": "reverse_exporter/dev",
	} {
		if h := got.Header.Get(header); h != want {
			t.Errorf("%s: %q, want %q", header, h, want)
		}
	}
}

// TestRedirect follows a redirect within the exporter.
func TestRedirect(t *testing.T) {
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/metrics" {
			http.Redirect(w, r, "/metrics/", http.StatusMovedPermanently)
			return
		}
		io.WriteString(w, "moved 1\n")
	}))
	defer exporter.Close()
	p, _ := newTestProgram(t, "--http", "x="+exporter.URL)
	wantContains(t, get(t, p, "/metrics").Body.String(), `moved{exporter_name="x"} 1`)
}

// TestUnixSocket scrapes an exporter at a Unix socket.
func TestUnixSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "x.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	exporter := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "path{p=%q} 1\n", r.URL.Path)
	})}}
	exporter.Start()
	defer exporter.Close()
	p, _ := newTestProgram(t, "--http", "x=http://unix:"+socket+":/deep/metrics")
	wantContains(t, get(t, p, "/metrics").Body.String(), `path{exporter_name="x",p="/deep/metrics"} 1`)
}

// TestFiles reads files that are none, and those that change.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir, "good.prom", "good 1\n")
	writeFile(t, dir, "bad.prom", "good 2\n}\n")
	if err := syscall.Mkfifo(dir+"/fifo", 0o644); err != nil {
		t.Fatal(err)
	}
	os.Symlink("nowhere", dir+"/dangling")
	for _, c := range []struct{ pattern, reason, page string }{
		{dir + "/good.prom", "", `good{exporter_name="x"} 1`},
		{dir + "/*.prom", "parse", `good{exporter_name="x"} 1`}, // the good ones of a glob are served
		{dir + "/*.none", "", ""},
		{dir + "/none", "file", ""},
		{dir + "/fifo", "file", ""},
		{dir + "/f*", "file", ""},
		{dir, "file", ""},
		{"/dev/zero", "file", ""},
		{dir + "/dangling", "file", ""},
	} {
		p, log := newTestProgram(t, "--file", "x="+c.pattern)
		page := get(t, p, "/metrics").Body.String()
		up := "1"
		if c.reason != "" {
			up = "0"
			wantContains(t, page, fmt.Sprintf(`failures_total{exporter_name="x",reason=%q} 1`, c.reason))
			wantContains(t, log.String(), "source=x reason="+c.reason)
		}
		wantContains(t, page, `source_up{exporter_name="x"} `+up, c.page)
		if strings.Contains(page, `good{exporter_name="x"} 2`) {
			t.Errorf("%s: a part of a broken file is served", c.pattern)
		}
	}
	p, _ := newTestProgram(t, "--file", "x="+dir+"/good.prom")
	os.Chtimes(dir+"/good.prom", time.Time{}, time.UnixMilli(1234567890123))
	wantContains(t, get(t, p, "/metrics").Body.String(), `reverse_exporter_file_mtime_seconds{exporter_name="x",file="`+dir+`/good.prom"} 1.234567890123e+09`)
}

// TestFileChanges takes nothing of a file that is written while it is read, and
// all of one that is renamed away.
func TestFileChanges(t *testing.T) {
	dir := t.TempDir()
	text := strings.Repeat("metric 1\n", windowSize)
	for name, change := range map[string]func(path string) error{
		"truncated": func(path string) error { return os.Truncate(path, int64(len(text)/2)) },
		"appended": func(path string) error {
			return os.WriteFile(path, []byte(text+"more 1\n"), 0o644)
		},
		"renamed": func(path string) error { return os.Rename(path, path+".old") },
	} {
		path := writeFile(t, dir, name, text)
		p, _ := newTestProgram(t, "--file", "x="+path)
		s := p.sources[0]
		r := &result{}
		ctx := &changingContext{Context: context.Background(), change: func() {
			if err := change(path); err != nil {
				t.Error(err)
			}
		}}
		f := s.readFile(ctx, r, path)
		if name == "renamed" {
			if f != nil || r.samples() != windowSize {
				t.Errorf("renamed: %d samples, %v", r.samples(), f)
			}
		} else if f == nil || f.reason != "file" || len(r.bodies) > 0 {
			t.Errorf("%s: %d bodies, %v", name, len(r.bodies), f)
		}
	}
}

// changingContext makes a change when it is asked for the second time whether it
// is done: between the first and the second read of a file.
type changingContext struct {
	context.Context
	asked  int
	change func()
}

func (c *changingContext) Err() error {
	if c.asked++; c.asked == 2 {
		c.change()
	}
	return nil
}

// Scrapes.

// TestDeadline answers in time with all but the source that hangs.
func TestDeadline(t *testing.T) {
	hang := make(chan struct{})
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-hang }))
	defer exporter.Close()
	defer close(hang)
	p, log := newTestProgram(t, "--http", "hangs="+exporter.URL, "--file", "beside=testdata/appliance/backup.prom")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	r := httptest.NewRequest("GET", "/metrics", nil).WithContext(ctx)
	r.Header.Set(timeoutHeader, "2")
	w := httptest.NewRecorder()
	p.ServeHTTP(w, r)
	if ctx.Err() != nil {
		t.Error("the answer came too late")
	}
	wantContains(t, w.Body.String(),
		`reverse_exporter_source_up{exporter_name="hangs"} 0`,
		`reverse_exporter_source_up{exporter_name="beside"} 1`,
		`backup_size_bytes{exporter_name="beside",target="nas"} 7.3014444032e+10`)
	if strings.Contains(w.Body.String(), `duration_seconds{exporter_name="hangs"`) {
		t.Error("a source that missed the deadline has a duration")
	}
	p.sources[0].runs.Wait() // the fetch that nobody waits for any more
	wantContains(t, get(t, p, "/metrics?exporter_name=beside").Body.String(), "reverse_exporter_source_up")
	p.sources[0].status.mu.Lock()
	defer p.sources[0].status.mu.Unlock()
	if n := p.sources[0].status.failures["timeout"]; n != 1 {
		t.Errorf("%d timeouts counted, want 1", n)
	}
	wantContains(t, log.String(), "source=hangs reason=timeout")
}

// TestTimeout ends a fetch at the source's own --timeout.
func TestTimeout(t *testing.T) {
	hang := make(chan struct{})
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "a 1\n")
		w.(http.Flusher).Flush()
		<-hang
	}))
	defer exporter.Close()
	defer close(hang)
	p, log := newTestProgram(t, "--http", "hangs="+exporter.URL, "--timeout", "hangs:50ms")
	wantContains(t, get(t, p, "/metrics").Body.String(), `failures_total{exporter_name="hangs",reason="timeout"} 1`)
	wantContains(t, log.String(), "no whole answer within 50ms")
}

// TestEndpoints serves sources on their paths, selects some of them, and says
// what is not there.
func TestEndpoints(t *testing.T) {
	p, _ := newTestProgram(t, "--file", "a=testdata/appliance/backup.prom", "--file", "b=/nowhere", "--exec", "c=testdata/appliance/certs.sh",
		"--path", "b:/b", "--path", "b:/all", "--path", "/metrics", "--path", "/all", "--require", "b")
	for _, c := range []struct {
		path string
		code int
		has  string
		not  string
	}{
		{"/metrics", 200, `source_up{exporter_name="a"} 1`, `exporter_name="b"`},
		{"/metrics?exporter_name=c", 200, `certs_days_left`, `exporter_name="a"`},
		{"/metrics?exporter_name=c&exporter_name=a", 200, `backup_size`, `exporter_name="b"`},
		{"/metrics?exporter_name=b", 404, "exporter_name", ""},
		{"/metrics?exporter_name=", 404, "exporter_name", ""},
		{"/metrics?a;b", 400, "query", ""},
		{"/all", 503, "down: b", "backup"},
		{"/all?exporter_name=a", 200, `backup_size`, `exporter_name="b"`},
		{"/b", 503, "down: b", ""},
		{"/none", 404, "nothing at this path", ""},
		{"/", 200, `href="metrics"`, ""},
		{"/-/healthy", 200, "OK", ""},
	} {
		w := get(t, p, c.path)
		if w.Code != c.code || !strings.Contains(w.Body.String(), c.has) || c.not != "" && strings.Contains(w.Body.String(), c.not) {
			t.Errorf("%s: %d, want %d with %q without %q:\n%s", c.path, w.Code, c.code, c.has, c.not, w.Body)
		}
	}
	for _, method := range []string{"POST", "PUT", "OPTIONS"} {
		w := httptest.NewRecorder()
		p.ServeHTTP(w, httptest.NewRequest(method, "/metrics", nil))
		if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: %d", method, w.Code)
		}
	}
}

// TestConflictsAreCounted wants the counts of a page on the page itself.
func TestConflictsAreCounted(t *testing.T) {
	const dir = "testdata/cases/"
	p, log := newTestProgram(t, "--file", "a="+dir+"conflicting-types/*.prom", "--file", "b="+dir+"raw-duplicates/a.prom", "--file", "c="+dir+"raw-duplicates/b.prom", "--raw", "b,c")
	for range 2 {
		wantContains(t, get(t, p, "/metrics").Body.String(),
			`reverse_exporter_conflicting_families{exporter_name="reverse_exporter"} 1`,
			`reverse_exporter_duplicate_series_dropped{exporter_name="reverse_exporter"} 5`) // v twice, m three times
	}
	if n := strings.Count(log.String(), "conflict: served untyped"); n != 1 {
		t.Errorf("the conflict is logged %d times, want once:\n%s", n, log)
	}
}

// Flags.

func TestBadFlags(t *testing.T) {
	const src = "--http=pg=http://localhost/"
	for _, c := range []struct {
		args string
		want []string
	}{
		{"", []string{"there is no source", "--http node=", "--file backup="}},
		{"--http x", []string{"--http, source 1: NAME=URL"}},
		{"--http -x=http://y --file _a=b --exec a/b=c", []string{"--http, source 1", "--file, source 1", "--exec, source 1"}},
		{"--http reverse_exporter=http://y", []string{"the program's own"}},
		{src + " --file pg=/x", []string{"--file pg: another source"}},
		{"--http a=ftp://x --http b=http:// --http c=http://unix: --http d=://", []string{"--http a: a URL", "--http b: a URL", "--http c: a URL", "--http d: this is no URL"}},
		{"--file a=[", []string{"--file a: a file name or a glob"}},
		{`--exec a= --exec b='x --exec c={x} --exec d=x|{`, []string{"--exec a: there is no command", "--exec b: the quote ' is not closed", "--exec c: the command itself", "--exec d: a brace"}},
		{src + " --timeout pg=5s", []string{"write --timeout pg:5s"}},
		{src + " --timeout 5 --timeout pg:0s --timeout x:5s", []string{"--timeout 5: a duration", "--timeout pg:0s: the duration", "--timeout x: no source"}},
		{src + " --timeout 5s --timeout 6s", []string{"--timeout 6s: given twice"}},
		{src + " --max-bytes 10 --max-bytes pg:1.5MiB --max-age pg:x", []string{"--max-bytes 10: a whole number", "--max-bytes pg:1.5MiB", "--max-age pg:x"}},
		{src + " --max-bytes 2GiB --max-bytes pg:0B", []string{"1GiB is the most", "--max-bytes pg:0B: a whole"}},
		{src + " --label a --label le=x --label exporter_name=x --label __x=y --label 1=2 --label pg:a=", []string{"--label a: KEY=VALUE", "name le", "name exporter_name", "name __x", "--label 1=2", "--label a=: a VALUE"}},
		{src + " --label a=b --label a=c", []string{"--label a=c: given twice"}},
		{src + " --path x --path pg:/ --path /-/x --path /a/", []string{"--path x: a path begins", "--path /: this path", "--path /-/x: this path", "--path /a/: a path has"}},
		{src + " --raw pg,x --require y", []string{"--raw x: no source", "--require y: no source"}},
		{src + " --interval 5s --interval pg:5s --max-age pg:5s", []string{"--interval: a NAME: is needed", "--interval pg: not together with --max-age"}},
		{src + " --interval pg:5s --params pg:x", []string{"--interval pg: not together with --params"}},
		{src + " --exec c=x --params c:x", []string{"--params c:x: only an http source"}},
		{"--exec c=x_{y} --exec d=x --path /a", []string{"--exec c: the command itself"}},
		{src + " --log.level loud --log.format xml --web.listen-address 99999", []string{"--log.level loud", "--log.format xml", "--web.listen-address 99999: an address"}},
		{src + " --bogus --also=x word --timeout", []string{"not defined: --bogus", "not defined: --also", "argument 4 is no flag", "flag needs an argument: --timeout"}},
		{src + " ---x --once=maybe", []string{"argument 2 is no flag", "invalid boolean"}},
	} {
		_, faults := parseFlags(strings.Fields(c.args))
		all := strings.Join(faults, "\n")
		for _, want := range c.want {
			if !strings.Contains(all, want) {
				t.Errorf("%s: %q is not in:\n%s", c.args, want, all)
			}
		}
		if len(faults) != len(c.want) && c.args != "" {
			t.Errorf("%s: %d faults, want %d:\n%s", c.args, len(faults), len(c.want), all)
		}
	}
	_, faults := parseFlags([]string{"--exec", "c=x {y}", "--exec", "d=x", "--http", "p=http://user:secret@host:port/", "--http", "http://user:secret@host/"})
	all := strings.Join(faults, "\n")
	wantContains(t, all, "--exec c: {y} has no default", "--path c:/c", "--http p: this is no URL")
	if strings.Contains(all, "secret") {
		t.Errorf("a secret is told:\n%s", all)
	}
}

// TestScopes wants the specific to win over the general, in any order.
func TestScopes(t *testing.T) {
	options := []string{"--timeout=pg:1s", "--timeout=2s", "--label=pg:a=own", "--label=a=all", "--label=b=x:y", "--path=/all", "--path=pg:/own", "--max-bytes=pg:1KiB"}
	for range 2 {
		p, _ := newTestProgram(t, append([]string{"--http=pg=http://x/", "--http=other=http://y"}, options...)...)
		pg, other := p.sources[0], p.sources[1]
		if pg.timeout != time.Second || other.timeout != 2*time.Second || pg.maxBytes != 1<<10 || other.maxBytes != 32<<20 {
			t.Errorf("timeouts %v, %v, sizes %d, %d", pg.timeout, other.timeout, pg.maxBytes, other.maxBytes)
		}
		if got := string(pg.added.text); got != `exporter_name="pg",a="own",b="x:y"` {
			t.Error(got)
		}
		if got := string(other.added.text); got != `exporter_name="other",a="all",b="x:y"` {
			t.Error(got)
		}
		if !slices.Equal(pg.paths, []string{"/own"}) || !slices.Equal(other.paths, []string{"/all"}) {
			t.Errorf("paths %v, %v", pg.paths, other.paths)
		}
		if other.origin != "http://y/metrics" || pg.origin != "http://x/" {
			t.Errorf("origins %s, %s", pg.origin, other.origin)
		}
		slices.Reverse(options)
	}
}

func TestDurations(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"10s": 10 * time.Second, "1h30m": 90 * time.Minute, "2d": 48 * time.Hour, "1d12h": 36 * time.Hour, "0.5d": 12 * time.Hour, "0": 0,
		"": -1, "5": -1, "-1s": -1, "d": -1, "1d1d": -1, "NaNd": -1, "1e300d": -1, "200000d": -1, "1d-1h": -1,
	} {
		d, err := parseDuration(text, false)
		if (err != nil) != (want < 0) || err == nil && d != want {
			t.Errorf("%q: %v, %v, want %v", text, d, err, want)
		}
	}
}

// Modes, end to end.

func TestOnce(t *testing.T) {
	cmd := programCommand("--once", "--file", "nginx=testdata/scrapes/nginx_exporter.prom", "--exec", "certs=testdata/appliance/certs.sh")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	wantContains(t, string(out), `nginx_connections_accepted{exporter_name="nginx"} 10`, `certs_days_left{exporter_name="certs",name="web"} 41`)
	checkShape(t, string(out))

	out, err = programCommand("--once", "--file", "x=/nowhere", "--path", "/other").Output()
	if exitCode(err) != 1 {
		t.Errorf("with a source down: %v, want exit status 1", err)
	}
	wantContains(t, string(out), `source_up{exporter_name="x"} 0`)
}

// exitCode returns the exit status of a command's error.
func exitCode(err error) int {
	if exit, ok := err.(*exec.ExitError); ok {
		return exit.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

func TestModes(t *testing.T) {
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"--help", 0, "Examples:"},
		{"--version", 0, "reverse_exporter dev"},
		{"--bogus --http x", 2, "--bogus"},
		{"", 2, "there is no source"},
		{"--check --exec x=sh --file y=testdata/*.none", 0, "2 sources are fine"},
		{"--check --exec x=no-such-program --file y=/nowhere", 1, "no-such-program"},
		{"--file x=y --web.listen-address unix:/no/such/dir/sock", 1, "failed to listen"},
	} {
		out, err := programCommand(strings.Fields(c.args)...).CombinedOutput()
		if exitCode(err) != c.code {
			t.Errorf("%q: %v, want exit status %d", c.args, err, c.code)
		}
		wantContains(t, string(out), c.want)
	}
	_, faults := parseFlags([]string{"--help"})
	if len(faults) > 0 {
		t.Error(faults)
	}
}

// started is a program that serves in a process of its own.
type started struct {
	*exec.Cmd
	url string
	log *syncBuffer
}

// start starts the program on a free port and waits until it listens.
func startProgram(t *testing.T, args ...string) *started {
	t.Helper()
	s := &started{Cmd: programCommand(append(args, "--web.listen-address", "127.0.0.1:0")...), log: &syncBuffer{}}
	r, w := io.Pipe()
	s.Stderr = io.MultiWriter(s.log, w)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Process.Kill()
		s.Wait()
	})
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if _, addr, ok := strings.Cut(lines.Text(), "msg=listening address="); ok {
			s.url = "http://" + addr
			break
		}
	}
	go io.Copy(io.Discard, r)
	return s
}

// TestServe scrapes the program over the network and stops it.
func TestServe(t *testing.T) {
	s := startProgram(t, "--file", "nginx=testdata/scrapes/nginx_exporter.prom")
	resp, err := http.Get(s.url + "/metrics") // asks for gzip
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	wantContains(t, string(body), `nginx_connections_accepted{exporter_name="nginx"} 10`)
	if got := resp.Header.Get("Content-Type"); !resp.Uncompressed || got != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("compressed %v, Content-Type %q", resp.Uncompressed, got)
	}
	s.Process.Signal(syscall.SIGTERM)
	if err := s.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// Fuzzing.

func FuzzParse(f *testing.F) {
	for _, file := range scrapes(f) {
		text, _ := os.ReadFile(file)
		f.Add(text[:min(len(text), 4000)])
	}
	cases, _ := filepath.Glob("testdata/cases/*/*.prom")
	for _, file := range cases {
		text, _ := os.ReadFile(file)
		f.Add(text)
	}
	added := &addedLabels{}
	added.add("exporter_name", "x")
	f.Fuzz(func(t *testing.T, text []byte) {
		e, err := read(bytes.NewReader(text), added, nil, 1<<30)
		if err != nil {
			return
		}
		page := pageText(merge([]*exposition{e}))
		again, err := read(strings.NewReader(page), &addedLabels{}, nil, 1<<30)
		if err != nil {
			t.Fatalf("%v in the page\n%s\nof\n%s", err, page, text)
		}
		if again.samples != e.samples {
			t.Fatalf("%d samples in the page, %d in the body", again.samples, e.samples)
		}
		if second := pageText(merge([]*exposition{again})); second != page {
			t.Fatalf("the page is\n%s\nand of itself\n%s", page, second)
		}
	})
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
		query := map[string][]string{}
		for _, p := range c.params {
			query[p.name] = []string{value}
		}
		values, _, err := c.values(query)
		if err != nil {
			if len(value) > 40 && strings.Contains(err.Error(), value) && !strings.Contains(line, value) { // longer than all words of it
				t.Errorf("the error repeats the value: %v", err)
			}
			return
		}
		if args := c.args(values); len(args) != len(c.words) {
			t.Errorf("%d words became %q", len(c.words), args)
		}
	})
}

// Speed.

// exposition of families gauges, counters, histograms and summaries with about
// series samples each: 100 of 100 are 1 MB.
func generate(families, series int) []byte {
	var b bytes.Buffer
	labels := func(i int) string {
		switch i % 4 {
		case 0:
			return fmt.Sprintf(`method="GET",code="200",handler="/api/v1/endpoint/%d"`, i)
		case 1:
			return fmt.Sprintf(`device="eth%d",state="up"`, i)
		case 2:
			return fmt.Sprintf(`namespace="prod-%d",pod="web-7d9c5b8f6-%05d",container="app"`, i%7, i)
		}
		return fmt.Sprintf(`shard="%d",path="C:\\DIR\\FILE.%d"`, i, i)
	}
	value := func(i int) string {
		return strconv.FormatFloat([]float64{float64(i % 1000), 94.05090880450125 / float64(i+1), float64(i) * 5.05702974996e+11, 0}[i%4], 'g', -1, 64)
	}
	for f := range families {
		name := fmt.Sprintf("%s_%04d", []string{"http_requests", "grpc_server_receive_bytes", "node_network_errors", "kube_pod_container_latency"}[f%4], f)
		switch f % 10 {
		case 7, 8:
			fmt.Fprintf(&b, "# HELP %s_seconds Histogram of %s in seconds.\n# TYPE %[1]s_seconds histogram\n", name, name)
			for i := range series / 14 {
				for _, le := range []string{"0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1", "2.5", "5", "10", "+Inf"} {
					fmt.Fprintf(&b, "%s_seconds_bucket{%s,le=%q} %d\n", name, labels(i), le, i)
				}
				fmt.Fprintf(&b, "%s_seconds_sum{%s} %s\n%[1]s_seconds_count{%[2]s} %[4]d\n", name, labels(i), value(i), i)
			}
		case 9:
			fmt.Fprintf(&b, "# HELP %s_seconds Summary of %s.\n# TYPE %[1]s_seconds summary\n", name, name)
			for i := range series / 7 {
				for _, q := range []string{"0", "0.25", "0.5", "0.75", "1"} {
					fmt.Fprintf(&b, "%s_seconds{%s,quantile=%q} %s\n", name, labels(i), q, value(i))
				}
				fmt.Fprintf(&b, "%s_seconds_sum{%s} %s\n%[1]s_seconds_count{%[2]s} %[4]d\n", name, labels(i), value(i), i)
			}
		default:
			kind := []string{"gauge", "counter"}[f%10/4]
			fmt.Fprintf(&b, "# HELP %s Current value of %s, sampled at scrape time.\n# TYPE %[1]s %[3]s\n", name, name, kind)
			for i := range series {
				fmt.Fprintf(&b, "%s{%s} %s\n", name, labels(i), value(i))
			}
		}
	}
	return b.Bytes()
}

// sizes are the bodies of the benchmarks, by name.
var sizes = []struct {
	name     string
	families int
}{{"1MB", 100}, {"10MB", 1000}}

// BenchmarkLines is what the others are compared with: it looks for line ends,
// and for nothing else.
func BenchmarkLines(b *testing.B) {
	body := generate(1000, 100)
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		for rest := body; len(rest) > 0; {
			rest = rest[bytes.IndexByte(rest, '\n')+1:]
		}
	}
}

// BenchmarkScrape parses and labels a body.
func BenchmarkScrape(b *testing.B) {
	added := &addedLabels{telling: true}
	added.add("exporter_name", "bench")
	for _, size := range sizes {
		b.Run(size.name, func(b *testing.B) {
			body := generate(size.families, 100)
			buf := make([]byte, 0, 2*len(body))
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := read(bytes.NewReader(body), added, buf, 1<<30); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkMerge puts two bodies of the same families on one page.
func BenchmarkMerge(b *testing.B) {
	for _, size := range sizes {
		b.Run(size.name, func(b *testing.B) {
			body := generate(size.families, 100)
			var bodies []*exposition
			for _, name := range []string{"one", "other"} {
				added := &addedLabels{telling: true}
				added.add("exporter_name", name)
				e, err := read(bytes.NewReader(body), added, nil, 1<<30)
				if err != nil {
					b.Fatal(err)
				}
				bodies = append(bodies, e)
			}
			b.SetBytes(int64(merge(bodies).size))
			b.ReportAllocs()
			for b.Loop() {
				merge(bodies)
			}
		})
	}
}
