package s3test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// Times applies h to the first n requests of a kind and lets all others through.
func Times(n int, kind Kind, h Hook) Hook {
	var seen atomic.Int64
	return func(w http.ResponseWriter, r *http.Request, req Request, next http.Handler) {
		if req.Kind == kind && seen.Add(1) <= int64(n) {
			h(w, r, req, next)
			return
		}
		next.ServeHTTP(w, r)
	}
}

// Refuse answers with a status and an error code, as a store does that cannot or will not.
func Refuse(status int, code string) Hook {
	return func(w http.ResponseWriter, r *http.Request, _ Request, _ http.Handler) {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(status)
		if r.Method != http.MethodHead {
			fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>injected</Message></Error>`, code)
		}
	}
}

// Reset closes the connection without an answer, so that the client sees ECONNRESET.
func Reset() Hook {
	return func(w http.ResponseWriter, _ *http.Request, _ Request, _ http.Handler) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		conn.Close()
	}
}

// Truncate breaks the answer's body off behind n bytes.
func Truncate(n int64) Hook {
	return func(w http.ResponseWriter, r *http.Request, _ Request, next http.Handler) {
		next.ServeHTTP(&cutWriter{ResponseWriter: w, left: n, atEnd: func() {}}, r)
		panic(http.ErrAbortHandler) // where the body was shorter than n
	}
}

// Stall sends nothing of the answer's body behind n bytes until the client gives up; n < 0 means no answer at all.
func Stall(n int64) Hook {
	return func(w http.ResponseWriter, r *http.Request, _ Request, next http.Handler) {
		wait := func() { <-r.Context().Done() }
		if n < 0 {
			wait()
			return
		}
		next.ServeHTTP(&cutWriter{ResponseWriter: w, left: n, atEnd: wait}, r)
	}
}

// SetHeader changes a header of the answer; the value "" takes it away.
func SetHeader(name, value string) Hook {
	return func(w http.ResponseWriter, r *http.Request, _ Request, next http.Handler) {
		next.ServeHTTP(&headerWriter{ResponseWriter: w, before: func() {
			if value == "" {
				w.Header().Del(name)
			} else {
				w.Header().Set(name, value)
			}
		}}, r)
	}
}

// IgnoreRange answers a ranged GET with the whole object, as a store does that knows no
// ranges. It looks at no condition and no signature.
func (s *Server) IgnoreRange() Hook {
	return func(w http.ResponseWriter, r *http.Request, req Request, _ http.Handler) {
		out, err := s.direct.GetObject(r.Context(), &s3.GetObjectInput{Bucket: &s.Bucket, Key: &req.Key})
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer out.Body.Close()
		w.Header().Set("ETag", aws.ToString(out.ETag))
		w.Header().Set("Last-Modified", aws.ToTime(out.LastModified).UTC().Format(http.TimeFormat))
		w.Header().Set("Content-Length", fmt.Sprint(aws.ToInt64(out.ContentLength)))
		io.Copy(w, out.Body)
	}
}

// Answered calls f when the gateway has answered, before the client learns of it.
func Answered(f func()) Hook {
	return func(w http.ResponseWriter, r *http.Request, _ Request, next http.Handler) {
		next.ServeHTTP(&headerWriter{ResponseWriter: w, before: f}, r)
	}
}

var errCut = errors.New("injected: the body ends here")

// cutWriter passes left bytes on, then calls atEnd and fails; the proxy aborts the connection.
type cutWriter struct {
	http.ResponseWriter
	left  int64
	atEnd func()
}

func (w *cutWriter) Write(p []byte) (int, error) {
	n := min(int64(len(p)), w.left)
	done, err := w.ResponseWriter.Write(p[:n])
	w.left -= int64(done)
	if err != nil || w.left > 0 {
		return done, err
	}
	http.NewResponseController(w.ResponseWriter).Flush()
	w.atEnd()
	return done, errCut
}

func (w *cutWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// headerWriter calls before when the answer's header is there and has not been sent.
type headerWriter struct {
	http.ResponseWriter
	before func()
}

func (w *headerWriter) WriteHeader(status int) {
	w.before()
	w.ResponseWriter.WriteHeader(status)
}

func (w *headerWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
