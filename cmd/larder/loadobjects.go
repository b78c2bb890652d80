package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/larderfs/larder/driver/kube"
	"github.com/larderfs/larder/master/client"
	"github.com/larderfs/larder/master/record"
)

// loadEntry is what `larder load --kubeconfig -o json` prints. Fields are added, never changed.
type loadEntry struct {
	Object  string          `json:"object"` // its name
	Paths   []string        `json:"paths"`
	Job     string          `json:"job,omitempty"`
	State   record.JobState `json:"state"`
	Files   int64           `json:"files"` // sum over the nodes, as all below
	Bytes   int64           `json:"bytes"`
	Present int64           `json:"presentFiles"` // of the files: cached before
	Failed  int64           `json:"failedFiles"`
	Nodes   string          `json:"nodes,omitempty"` // ended, of all
	Message string          `json:"message,omitempty"`
}

func newLoadEntry(o kube.Load) loadEntry {
	s := o.Status
	e := loadEntry{Object: o.Name, Paths: o.Spec.Paths, Job: s.Job, State: record.JobState(s.State), Files: s.Files, Bytes: s.Bytes,
		Present: s.PresentFiles, Failed: s.FailedFiles, Nodes: s.Nodes, Message: s.Message}
	if e.State == "" { // no master has seen it yet
		e.State = record.JobWaiting
	}
	return e
}

func (e loadEntry) print(out io.Writer) error {
	fmt.Fprintf(out, "%s  %s  %s\n\n", e.Object, e.State, strings.Join(e.Paths, " "))
	t := newTable(out)
	fmt.Fprintln(t, "JOB\tNODES\tFILES\tBYTES\tPRESENT\tFAILED\t")
	fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%d\t%d\t%s\n", orDash(e.Job), orDash(e.Nodes), e.Files, bytes(e.Bytes), e.Present, e.Failed, e.Message)
	return t.Flush()
}

// loadObject makes a Load object, and follows it.
func (q *clusterQuestion) loadObject(cmd *cobra.Command, objects kube.LoadObjects, cluster string, spec client.JobSpec, detach bool) error {
	ctx, name := cmd.Context(), string(spec.Kind)+"-"+strings.ToLower(rand.Text()[:10])
	want := kube.LoadSpec{Paths: spec.URIs, Endpoint: spec.Endpoint, Nodes: spec.Nodes, Pin: spec.Kind == record.Pin}
	if spec.All {
		want.Nodes = []string{kube.AllNodes}
	}
	if err := explainObjects("create Load "+name, "loads", cluster, objects.Create(ctx, name, want)); err != nil {
		return err
	}
	e := loadEntry{Object: name, Paths: spec.URIs, State: record.JobWaiting}
	if detach {
		return q.print(cmd.OutOrStdout(), e, func(w io.Writer) error {
			_, err := fmt.Fprintln(w, name)
			return err
		})
	}
	e, err := followObject(ctx, objects, e, cluster, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	if err := q.print(cmd.OutOrStdout(), e, e.print); err != nil {
		return err
	}
	if e.State != record.JobDone {
		return fmt.Errorf("load %s %s: %s", name, e.State, e.Message)
	}
	return nil
}

// followObject shows the progress until the job has ended.
func followObject(ctx context.Context, objects kube.LoadObjects, e loadEntry, cluster string, progress io.Writer) (loadEntry, error) {
	bar := newMeter(progress)
	defer bar.end()
	for !e.State.Ended() {
		select {
		case <-time.After(followEvery):
		case <-ctx.Done():
			return e, fmt.Errorf("load %s goes on; `kubectl get loads.%s %[1]s` tells how far it is, `kubectl delete loads.%[2]s %[1]s` ends it", e.Object, kube.Group)
		}
		o, err := objects.Load(ctx, e.Object)
		if err != nil && ctx.Err() == nil {
			return e, explainObjects("look at Load "+e.Object, "loads", cluster, err)
		}
		if err == nil {
			e = newLoadEntry(o)
			bar.show(fmt.Sprintf("%s %s: %d files, %s, %s nodes ended", e.Object, e.State, e.Files, bytes(e.Bytes), orDash(e.Nodes)))
		}
	}
	return e, nil
}
