package master

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"

	"go.uber.org/zap/zapcore"
)

// zapCore writes what etcd logs, warnings and worse, to slog. It is a zapcore.Core.
type zapCore struct {
	log    *slog.Logger
	quiet  atomic.Bool // only what is fatal
	parent *zapCore    // whose quiet counts, if not nil
}

var _ zapcore.Core = (*zapCore)(nil)

func (c *zapCore) isQuiet() bool {
	if c.parent != nil {
		return c.parent.isQuiet()
	}
	return c.quiet.Load()
}

func (c *zapCore) Enabled(l zapcore.Level) bool {
	return l >= zapcore.DPanicLevel || l >= zapcore.WarnLevel && !c.isQuiet()
}

func (c *zapCore) With(fields []zapcore.Field) zapcore.Core {
	return &zapCore{log: c.log.With(attrs(fields)...), parent: c}
}

func (c *zapCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *zapCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelError
	if e.Level == zapcore.WarnLevel {
		level = slog.LevelWarn
	}
	c.log.Log(context.Background(), level, "etcd: "+e.Message, attrs(fields)...)
	return nil
}

func (c *zapCore) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	m := zapcore.NewMapObjectEncoder()
	var out []any
	for _, f := range fields {
		f.AddTo(m)
		if v, ok := m.Fields[f.Key]; ok {
			out = append(out, slog.Any(f.Key, v))
		}
	}
	return out
}

func text(fields []zapcore.Field) (s string) {
	for _, a := range attrs(fields) {
		s += fmt.Sprintf(" %v", a)
	}
	return s
}
