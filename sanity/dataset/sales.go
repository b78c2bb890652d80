package dataset

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"time"
)

const header = "order_id,ordered_at,store,sku,product,quantity,unit_price,discount,customer,payment\n"

func quarterName(q int) string { return fmt.Sprintf("sales-%d-q%d.csv", 2024+q/4, q%4+1) }

type product struct {
	sku, name string // as they stand in the file
	cents     int
}

var (
	materials = []string{"Oak", "Steel", "Ceramic", "Linen", "Glass", "Bamboo", "Wool", "Copper", "Paper", "Walnut", "Cotton", "Slate"}
	things    = []string{"Kettle", "Mug", "Chair", "Lamp", "Bowl", "Tray", "Blanket", "Clock", "Frame", "Basket", "Board", "Vase", "Stool", "Shelf", "Towel", "Pan"}
	variants  = []string{"", ", small", ", large", ", set of 4", " \"\"Nordic\"\"", " 0.5 l", ", black", ", white", " Classic"}
	payments  = []string{"card", "card", "card", "cash", "cash", "voucher", "app", "invoice"}
	discounts = []string{"0.00", "0.00", "0.00", "0.00", "0.05", "0.10", "0.15", "0.25"}
)

// catalogue is what the shops sell; the same for all quarters.
func catalogue() []product {
	r := rand.New(rand.NewPCG(1, 1))
	var all []product
	for _, m := range materials {
		for _, t := range things {
			for _, v := range variants {
				name := m + " " + t + v
				if v != "" {
					name = `"` + name + `"`
				}
				sku := fmt.Sprintf("%c%c-%05d", m[0], t[0], len(all)*37%100000)
				all = append(all, product{sku: sku, name: name, cents: 199 + r.IntN(20000)})
			}
		}
	}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// writeQuarter writes the header and rows until there are at least size bytes. The rows
// depend on q alone, so a longer table starts with the rows of a shorter one.
func writeQuarter(ctx context.Context, w io.Writer, q int, size int64) error {
	products := catalogue()
	r := rand.New(rand.NewPCG(20240101, uint64(q)))
	popular := rand.NewZipf(r, 1.1, 8, uint64(len(products)-1))
	at := time.Date(2024, time.Month(1+3*q), 1, 7, 0, 0, 0, time.UTC)
	var second int64 // of stamp
	var stamp []byte
	order := int64(q+1) * 1_000_000_000
	const batch = 64 << 10
	buf := make([]byte, 0, batch)
	buf = append(buf, header...)
	for size > 0 {
		for len(buf) < batch-256 && int64(len(buf)) < size {
			if r.IntN(3) > 0 { // else another item of the same order
				order++
				at = at.Add(time.Duration(r.IntN(900)) * time.Millisecond)
			}
			if s := at.Unix(); s != second {
				second, stamp = s, at.AppendFormat(stamp[:0], "2006-01-02T15:04:05Z")
			}
			buf = appendRow(buf, r, order, stamp, &products[popular.Uint64()])
		}
		if _, err := w.Write(buf); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		size -= int64(len(buf))
		buf = buf[:0]
	}
	return nil
}

func appendRow(b []byte, r *rand.Rand, order int64, stamp []byte, p *product) []byte {
	bits := r.Uint64()
	pick := func(n uint64) int { // a small number from bits that no other one uses
		v := int(bits % n)
		bits /= n
		return v
	}
	b = strconv.AppendInt(b, order, 10)
	b = append(b, ',')
	b = append(b, stamp...)
	b = append(b, ",S"...)
	b = strconv.AppendInt(b, int64(1000+pick(420)), 10)
	b = append(b, ',')
	b = append(b, p.sku...)
	b = append(b, ',')
	b = append(b, p.name...)
	b = append(b, ',')
	b = strconv.AppendInt(b, int64(1+pick(4)*pick(3)), 10)
	b = append(b, ',')
	b = strconv.AppendInt(b, int64(p.cents/100), 10)
	b = append(b, '.', byte('0'+p.cents/10%10), byte('0'+p.cents%10), ',')
	b = append(b, discounts[pick(8)]...)
	b = append(b, ",C"...)
	b = strconv.AppendInt(b, int64(10_000_000+pick(4_000_000)), 10)
	b = append(b, ',')
	b = append(b, payments[pick(8)]...)
	return append(b, '\n')
}
